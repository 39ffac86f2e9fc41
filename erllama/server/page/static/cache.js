// The view of the cache: what the tiers hold, how much of the prompts they had over time, pins, and the models.

import { getJson } from "./api.js";
import { button, element, svg } from "./dom.js";
import { bytes, percent, plural, seconds, whole } from "./numbers.js";

const REFRESH_MS = 2000;
const TIER_NAMES = { live: "Context", ram: "Memory", ram_file: "Memory, shared", disk: "Disk" };
const TIER_TEXTS = {
  live: "cells of the models, which need no copy",
  ram: "gone when the server stops",
  ram_file: "kept over a restart of the server",
  disk: "kept over a restart of the machine",
};
const STATES = { loaded: "Loaded", restarting: "Restarting", unloaded: "Not loaded", loading: "Loading", unloading: "Unloading" };
const RANGES = [
  ["15 minutes", 15 * 60],
  ["1 hour", 3600],
  ["All", Infinity],
];
const N_COLUMNS = 48;

/** Refreshes the view while it is shown and the tab is visible. */
export class CacheView {
  constructor(container, onError) {
    Object.assign(this, { container, onError, range: RANGES[1][1], timer: 0, isShown: false });
    this.parts = {};
    for (const name of ["summary", "problem", "tiers", "chart", "models", "pins"]) this.parts[name] = element("div");
    this.parts.problem.setAttribute("role", "alert");
    this.ranges = element("div", { class: "ranges", role: "group", "aria-label": "Time" }, RANGES.map((range) => this.rangeButton(range)));
    const section = (title, ...nodes) => element("section", { class: "panel", "aria-label": title }, ...nodes);
    this.pins = section("Pins", element("h3", {}, "Pins"), this.parts.pins);
    container.replaceChildren(
      element(
        "div",
        { class: "cache-inner" },
        element("h2", { class: "hidden" }, "The cache"),
        this.parts.problem,
        this.parts.summary,
        section("Tiers", element("h3", {}, "Tiers"), this.parts.tiers),
        section("Hit rate", element("div", { class: "panel-head" }, element("h3", {}, "Prompt tokens from the cache"), this.ranges), this.parts.chart),
        section("Models", element("h3", {}, "Models"), this.parts.models),
        this.pins,
      ),
    );
    document.addEventListener("visibilitychange", () => this.refreshWhileShown());
  }

  show(isShown) {
    this.isShown = isShown;
    this.container.hidden = !isShown;
    this.refreshWhileShown();
  }

  rangeButton([name, length]) {
    const pick = () => {
      this.range = length;
      for (const each of this.ranges.children) each.setAttribute("aria-pressed", String(each === made));
      if (this.status) this.draw(this.status);
    };
    const made = button(name, pick, { class: "quiet", "aria-pressed": length === this.range });
    made.setAttribute("aria-pressed", String(length === this.range));
    return made;
  }

  refreshWhileShown() {
    clearTimeout(this.timer);
    if (this.isShown && document.visibilityState === "visible") this.refresh();
  }

  async refresh() {
    clearTimeout(this.timer);
    try {
      this.status = await getJson("/erllama/status");
      this.parts.problem.replaceChildren();
      this.draw(this.status);
    } catch (error) {
      const retry = button("Try again", () => this.refresh());
      this.parts.problem.replaceChildren(element("div", { class: "failure" }, element("p", {}, error.message), retry));
      this.onError(error);
      return;
    }
    if (this.isShown) this.timer = setTimeout(() => this.refreshWhileShown(), REFRESH_MS);
  }

  draw(status) {
    const { parts } = this;
    this.put(parts.summary, summary(status));
    this.put(parts.tiers, tiers(status.tiers));
    this.put(parts.chart, chart(status, this.range));
    this.put(parts.models, models(status.models));
    this.put(parts.pins, pins(status.pins, status.time));
  }

  /** Replace what a part shows, unless it is the same: a screen reader keeps its place. */
  put(part, node) {
    if (!part.firstChild?.isEqualNode(node)) part.replaceChildren(node);
  }
}

function summary({ totals, models: all }) {
  const running = sum(all, (model) => model.slots?.running ?? 0);
  const waiting = sum(all, (model) => model.slots?.waiting ?? 0);
  const facts = [
    [percent(totals.cached_tokens, totals.prompt_tokens), "of prompt tokens came from the cache"],
    [whole(totals.cached_tokens), "prompt tokens not computed again"],
    [whole(totals.prompt_tokens - totals.cached_tokens), "prompt tokens computed"],
    [whole(totals.requests), `${totals.requests === 1 ? "request" : "requests"} since the start; ${running} running, ${waiting} waiting`],
  ];
  return element(
    "dl",
    { class: "facts" },
    facts.map(([value, text]) => element("div", {}, element("dt", {}, text), element("dd", {}, value))),
  );
}

function sum(items, read) {
  return items.reduce((total, item) => total + read(item), 0);
}

function tiers(all) {
  if (!all.length) return element("p", { class: "muted" }, "This server has no cache beyond the contexts of its models.");
  return element("ul", { class: "tiers" }, all.map((each) => tier(each, tierName(each, all))));
}

/** Return the name of a tier, with a number if there are several of its kind, such as directories. */
function tierName(one, all) {
  const same = all.filter((other) => other.tier === one.tier);
  const name = TIER_NAMES[one.tier] ?? one.tier;
  return same.length > 1 ? `${name} ${same.indexOf(one) + 1}` : name;
}

function tier({ tier: kind, bytes: used, limit, blocks, read_only: isReadOnly, failed }, name) {
  const state = failed ? "Not in use: the log of the server has the cause" : isReadOnly ? "Read only" : (TIER_TEXTS[kind] ?? "");
  const size = limit && !isReadOnly ? `${bytes(used)} of ${bytes(limit)}, ${percent(used, limit)}` : bytes(used);
  const bar = element("div", { class: "bar-track", "aria-hidden": "true" }, element("div", { class: "bar-part" }));
  if (!used) bar.firstChild.hidden = true;
  bar.firstChild.style.setProperty("--share", String(limit ? Math.min(used / limit, 1) : 0));
  return element(
    "li",
    { class: failed ? "tier failed" : "tier" },
    element("div", { class: "tier-head" }, element("strong", {}, name), element("span", { class: "muted" }, state)),
    limit && !isReadOnly ? bar : null,
    element("div", { class: "tier-size" }, element("span", {}, size), element("span", { class: "muted" }, plural(blocks, "block"))),
  );
}

// --- the chart ------------------------------------------------------------------------------------

/** Return columns of equal length in time, up to now, with the sums of the intervals in each. */
function columns({ time, history }, range) {
  const { intervals, interval_seconds: step } = history;
  const oldest = intervals.length ? intervals[0].began : time;
  const length = Math.max(Math.min(range, time - oldest + step), 5 * 60);
  const width = length / N_COLUMNS;
  const found = Array.from({ length: N_COLUMNS }, (_, index) => ({
    from: time - length + index * width,
    requests: 0,
    prompt: 0,
    cached: 0,
  }));
  for (const each of intervals) {
    const at = Math.floor((Math.min(each.began + step / 2, time) - (time - length)) / width);
    const column = found[Math.min(at, N_COLUMNS - 1)];
    if (!column) continue;
    column.requests += each.requests;
    column.prompt += each.prompt_tokens;
    column.cached += each.cached_tokens;
  }
  return found;
}

function chart(status, range) {
  const all = columns(status, range);
  const used = all.filter((column) => column.prompt);
  if (!used.length) return element("p", { class: "muted" }, "No request ended in this time.");
  const [prompt, cached] = [sum(used, (column) => column.prompt), sum(used, (column) => column.cached)];
  const text = `${percent(cached, prompt)}: ${whole(cached)} of ${plural(prompt, "prompt token")} in ${plural(sum(used, (c) => c.requests), "request")}`;
  return element(
    "div",
    {},
    element("p", { class: "chart-text" }, text),
    element("div", { class: "chart" }, axis(), drawing(all, text)),
    element("p", { class: "times muted" }, element("span", {}, clock(all[0].from)), element("span", {}, clock(status.time))),
    element("details", {}, element("summary", {}, "As a table"), table(["Time", "Requests", "Prompt tokens", "Cached"], used.map(columnCells))),
  );
}

function axis() {
  return element("div", { class: "axis muted", "aria-hidden": "true" }, ["100 %", "50 %", "0 %"].map((text) => element("span", {}, text)));
}

function drawing(all, text) {
  const [height, width, gap] = [100, 10, 2];
  const lines = [0, 50, 100].map((y) => svg("line", { x1: 0, x2: N_COLUMNS * width, y1: y, y2: y }));
  const bars = all.flatMap((column, index) => {
    if (!column.prompt) return [];
    const size = { x: index * width + gap / 2, width: width - gap };
    const share = (column.cached / column.prompt) * height;
    const title = svg("title", {}, `${clock(column.from)}: ${percent(column.cached, column.prompt)} of ${plural(column.prompt, "token")}`);
    return svg(
      "g",
      {},
      title,
      svg("rect", { class: "computed", y: 0, height, ...size }),
      svg("rect", { class: "cached", y: height - share, height: share, ...size }),
    );
  });
  return svg(
    "svg",
    { viewBox: `0 0 ${N_COLUMNS * width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `Prompt tokens from the cache over time. ${text}.` },
    lines,
    bars,
  );
}

function clock(time) {
  return new Date(time * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}

function columnCells({ from, requests, prompt, cached }) {
  return [clock(from), whole(requests), whole(prompt), `${whole(cached)} (${percent(cached, prompt)})`];
}

// --- tables ---------------------------------------------------------------------------------------

/** Return a table. The first `nTexts` columns are texts, and the others are numbers. */
function table(head, rows, nTexts = 1) {
  const cell = (tag, value, index) =>
    element(tag, { scope: tag === "th" ? "col" : null, class: index >= nTexts ? "number" : null }, value);
  return element(
    "div",
    { class: "table", tabindex: "0", role: "group", "aria-label": head.join(", ") },
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, head.map((text, index) => cell("th", text, index)))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map((value, index) => cell("td", value, index))))),
    ),
  );
}

function models(all) {
  return table(["Model", "State", "Memory", "Running", "Waiting", "Context"], all.map(modelCells), 2);
}

function modelCells(model) {
  const { name, state, memory_bytes: memory, slots, n_ctx: context } = model;
  const notes = [
    model.uses_cache === false && "does not use the cache",
    model.restarts > 0 && plural(model.restarts, "restart"),
    model.progress !== undefined && percent(model.progress, 1),
    model.expires_in != null && `unloaded in ${seconds(model.expires_in)}`,
  ];
  return [
    element("span", {}, name, notes.filter(Boolean).map((note) => element("span", { class: "muted note" }, note))),
    STATES[state] ?? state,
    memory ? bytes(memory) : "–",
    slots ? `${slots.running} of ${slots.total}` : "–",
    slots ? whole(slots.waiting) : "–",
    context ? plural(context, "token") : "–",
  ];
}

function pins(all, now) {
  if (!all.length) return element("p", { class: "muted" }, "No prompt is pinned.");
  const expiry = (time) => (time ? `in ${seconds(Math.max(time - now, 0))}` : "never");
  const tokens = (pin) =>
    pin.stored_tokens < pin.tokens ? `${whole(pin.stored_tokens)} of ${whole(pin.tokens)} stored` : whole(pin.tokens);
  const row = (pin) => [pin.name, pin.model, tokens(pin), bytes(pin.bytes), expiry(pin.expires)];
  return table(["Pin", "Model", "Tokens", "Size", "Expires"], all.map(row), 2);
}
