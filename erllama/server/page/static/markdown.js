// A subset of Markdown, rendered as elements. Markup of HTML in the text stays text.
//
// Blocks: paragraphs, headings, code, lists, quotations, tables, rules. Inline: code, bold, italic, struck, links.
// Links are links for http and https alone. Anything else is shown as it was written.

import { button, copyText, element } from "./dom.js";

const MAX_DEPTH = 8;
// How far the end of an inline mark may be, in characters: a text of opening marks alone must not take quadratic time.
const MAX_SPAN = 2000;

// No two neighbours in a pattern match the same characters, so a line takes linear time. A line has no line feed.
const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/s;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*)|$)/s;
const QUOTE = /^ {0,3}> ?(.*)$/s;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/; // without the spaces at its end

/**
 * Show a text in an element, and reuse what it shows already.
 *
 * While a reply grows, only its last blocks change; the others keep their elements, with what a person selected.
 */
export function showMarkdown(container, text) {
  const blocks = parseBlocks(text.split(/\r?\n/), 0);
  const shown = container.shownBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < shown.length && shown[same] === blocks[same].source) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(renderBlock(block, 0));
  container.shownBlocks = blocks.map((block) => block.source);
}

// --- blocks ---------------------------------------------------------------------------------------

function parseBlocks(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const block = parseBlock(lines, at, depth);
    block.source = `${block.kind}\n${lines.slice(at, block.end).join("\n")}`;
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function parseBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return parseCode(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return { kind: "heading", level: heading[1].length, text: headingText(heading[2] ?? ""), end: at + 1 };
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (depth < MAX_DEPTH && QUOTE.test(line)) return parseQuote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return parseList(lines, at, depth);
  if (line.includes("|") && at + 1 < lines.length && DELIMITERS.test(lines[at + 1].trimEnd())) {
    const table = parseTable(lines, at);
    if (table) return table;
  }
  let end = at + 1;
  while (end < lines.length && !interrupts(lines[end])) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).join("\n"), end };
}

/** Return the text of a heading without the marks that may close it. */
function headingText(text) {
  return text.trim().replace(/(?:^|[ \t])#+$/, "").trimEnd();
}

function interrupts(line) {
  return line.trim() === "" || [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function parseCode(lines, at, fence) {
  const mark = fence[1];
  let end = at + 1;
  const isEnd = (line) => {
    const found = line.trim();
    return found.length >= mark.length && found === mark[0].repeat(found.length);
  };
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  const language = fence[2].trim().split(/\s/)[0];
  return { kind: "code", language, text: lines.slice(at + 1, end).join("\n"), end: Math.min(end + 1, lines.length) };
}

function parseQuote(lines, at, depth) {
  let end = at;
  const inner = [];
  for (let found; end < lines.length && (found = QUOTE.exec(lines[end])); end += 1) inner.push(found[1]);
  return { kind: "quote", blocks: parseBlocks(inner, depth + 1), end };
}

function parseList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(first[2]);
  const indent = first[1].length;
  const items = [];
  let end = at;
  while (end < lines.length) {
    const line = lines[end];
    const found = ITEM.exec(line);
    const begins = found && found[1].length <= indent + 1 && /\d/.test(found[2]) === isOrdered && !RULE.test(line);
    if (begins) items.push({ lines: [found[3] ?? ""], width: found[1].length + found[2].length + 1 });
    else if (line.trim() === "") {
      if (!continuesList(lines, end + 1, indent)) break;
      items.at(-1).lines.push("");
    } else if (/^ */.exec(line)[0].length > indent) items.at(-1).lines.push(dedent(line, items.at(-1).width));
    else if (!interrupts(line) && lines[end - 1].trim() !== "") items.at(-1).lines.push(line);
    else break;
    end += 1;
  }
  return {
    kind: "list",
    start: isOrdered ? parseInt(first[2], 10) : null,
    items: items.map((item) => parseBlocks(item.lines, depth + 1)),
    end,
  };
}

/** Return whether the line after an empty one belongs to the list. */
function continuesList(lines, at, indent) {
  if (at >= lines.length || lines[at].trim() === "") return false;
  const found = ITEM.exec(lines[at]);
  return /^ */.exec(lines[at])[0].length > indent || Boolean(found && found[1].length === indent);
}

function dedent(line, width) {
  return line.slice(Math.min(/^ */.exec(line)[0].length, width));
}

function parseTable(lines, at) {
  const head = cells(lines[at]);
  if (cells(lines[at + 1]).length !== head.length) return null;
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|") && lines[end].trim() !== ""; end += 1) {
    rows.push(cells(lines[end]).slice(0, head.length));
  }
  return { kind: "table", head, rows, end };
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function renderBlock(block) {
  switch (block.kind) {
    case "heading":
      // The page itself has the first two levels.
      return element(`h${Math.min(block.level + 2, 6)}`, {}, renderInline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, block.blocks.map(renderBlock));
    case "code":
      return renderCode(block);
    case "list":
      return renderList(block);
    case "table":
      return renderTable(block);
    default:
      return element("p", {}, renderInline(block.text));
  }
}

function renderCode({ language, text }) {
  const copy = button("Copy", () => copyText(text, copy), { class: "quiet", "aria-label": "Copy the code" });
  const name = /^[\w+#.-]{1,20}$/.test(language) ? language : "";
  return element(
    "div",
    { class: "code" },
    element("div", { class: "code-bar" }, element("span", {}, name || "text"), copy),
    // A person without a mouse scrolls it with the arrow keys.
    element("pre", { tabindex: "0", role: "group", "aria-label": name ? `Code, ${name}` : "Code" }, element("code", {}, text)),
  );
}

function renderList({ start, items }) {
  const isOrdered = start !== null;
  return element(
    isOrdered ? "ol" : "ul",
    { start: isOrdered && start !== 1 ? start : null },
    items.map((blocks) => {
      // The text of a tight item stands in it directly.
      const tight = blocks.length && blocks[0].kind === "paragraph" && blocks.slice(1).every((b) => b.kind === "list");
      const [first, ...rest] = blocks;
      return tight
        ? element("li", {}, renderInline(first.text), rest.map(renderBlock))
        : element("li", {}, blocks.map(renderBlock));
    }),
  );
}

function renderTable({ head, rows }) {
  const row = (tag, texts) =>
    element("tr", {}, texts.map((text) => element(tag, tag === "th" ? { scope: "col" } : {}, renderInline(text))));
  return element(
    "div",
    { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
    element(
      "table",
      {},
      element("thead", {}, row("th", head)),
      element("tbody", {}, rows.map((texts) => row("td", texts))),
    ),
  );
}

// --- inline ---------------------------------------------------------------------------------------

const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "s"],
  ["*", "em"],
  ["_", "em"],
];

/** Return the nodes of a line of text with inline marks. */
export function renderInline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const found = depth < MAX_DEPTH ? readInline(text, at, depth) : null;
    if (!found) {
      plain += text[at];
      at += 1;
      continue;
    }
    if (found.node !== undefined && plain) {
      nodes.push(plain);
      plain = "";
    }
    if (found.node !== undefined) nodes.push(found.node);
    else plain += found.text;
    at = found.end;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** Return what begins at a position, and where it ends: a node, or a plain text; null for an ordinary character. */
function readInline(text, at, depth) {
  const char = text[at];
  if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) return { text: text[at + 1], end: at + 2 };
  if (char === "`") return readCode(text, at);
  if (char === "[") return readLink(text, at, depth);
  if (char === "*" || char === "_" || char === "~") return readMark(text, at, depth);
  return null;
}

function readCode(text, at) {
  const ticks = /^`+/.exec(text.slice(at, at + 20))[0];
  const begin = at + ticks.length;
  const near = text.slice(begin, begin + MAX_SPAN);
  for (let end = near.indexOf(ticks); end >= 0; end = near.indexOf(ticks, end + 1)) {
    if (near[end + ticks.length] === "`" || (end > 0 && near[end - 1] === "`")) continue;
    const inner = near.slice(0, end);
    const isPadded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "";
    return { node: element("code", {}, isPadded ? inner.slice(1, -1) : inner), end: begin + end + ticks.length };
  }
  return { text: ticks, end: begin };
}

function readMark(text, at, depth) {
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, at)) continue;
    const begin = at + mark.length;
    // Snake_case is no emphasis, and neither is 2 * 3.
    if (/\s/.test(text[begin] ?? " ") || (mark[0] === "_" && /\w/.test(text[at - 1] ?? ""))) continue;
    const near = text.slice(begin, begin + MAX_SPAN);
    const end = endOfMark(near, mark);
    if (end > 0) return { node: element(tag, {}, renderInline(near.slice(0, end), depth + 1)), end: begin + end + mark.length };
  }
  const run = new RegExp(`^\\${text[at]}+`).exec(text.slice(at, at + MAX_SPAN))[0];
  return { text: run, end: at + run.length };
}

function endOfMark(near, mark) {
  for (let end = near.indexOf(mark); end >= 0; end = near.indexOf(mark, end + 1)) {
    const after = near[end + mark.length] ?? "";
    if (end === 0 || /\s/.test(near[end - 1]) || near[end - 1] === "\\") continue;
    if (mark.length === 1 && (after === mark || near[end - 1] === mark)) continue;
    if (mark[0] === "_" && /\w/.test(after)) continue;
    // Three in a row after an open single mark: the first closes that one, as in ***both***.
    const closesInner = mark.length === 2 && after === mark[0] && near.slice(0, end).split(mark[0]).length % 2 === 0;
    return closesInner ? end + 1 : end;
  }
  return -1;
}

function readLink(text, at, depth) {
  const found = /^\[([^[\]\n]{1,1000})\]\(([^()\s]{1,1000}(?:\([^()\s]{0,200}\)[^()\s]{0,1000})?)(?:\s+"[^"\n]{0,300}")?\)/.exec(
    text.slice(at, at + MAX_SPAN),
  );
  if (!found) return null;
  const end = at + found[0].length;
  const url = webAddress(found[2]);
  if (url === null) return { text: found[0], end };
  const attributes = { href: url, target: "_blank", rel: "noopener noreferrer nofollow", title: url };
  return { node: element("a", attributes, renderInline(found[1], depth + 1)), end };
}

/** Return an address of the web; null for anything else, such as `javascript:`. */
function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}
