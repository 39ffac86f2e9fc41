// Shows the messages of a conversation, and what can be done with each.

import { ROOT, shownMessages, siblings } from "./conversations.js";
import { button, copyText, element, isComposing } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { figuresText, percent, seconds } from "./numbers.js";

/**
 * The messages of one conversation in an element.
 *
 * `actions` has what the buttons do: `edit`, `regenerate`, `choose`, `sendResults`, `retry`.
 */
export class MessageList {
  constructor(container, scroller, actions) {
    Object.assign(this, { container, scroller, actions });
    this.editing = null;
    this.frame = 0;
  }

  /** Show a conversation. `running` is the message that is being written, if any. */
  show(conversation, running) {
    Object.assign(this, { conversation, running });
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const shown = shownMessages(conversation);
    this.byId = new Map();
    const articles = shown.map((message, index) => this.article(message, shown[index - 1], index === shown.length - 1));
    this.container.replaceChildren(...(articles.length ? articles : [emptyState()]));
  }

  /** Show what was added to the message that is being written, at most once for each frame of the screen. */
  update(message) {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      const parts = this.byId.get(message.id);
      if (!parts) return;
      const atEnd = this.isAtEnd();
      this.fillReply(message, parts);
      if (atEnd) this.scrollToEnd();
    });
  }

  isAtEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < 80;
  }

  scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** Move the focus to a button of a message, by the button's name. */
  focusOn(message, name) {
    const article = this.byId.get(message)?.article;
    (article?.querySelector(`[data-action="${name}"]:not([disabled])`) ?? article)?.focus();
  }

  article(message, previous, isLast) {
    const name = { user: "You", assistant: "Reply", tool: `Result of ${message.name || "a tool"}` }[message.role];
    const article = element("article", { class: `message ${message.role}`, "aria-label": name, tabindex: "-1" });
    const parts = { article };
    this.byId.set(message.id, parts);
    if (this.editing === message.id) article.append(this.editor(message));
    else if (message.role === "assistant") this.reply(message, parts, isLast);
    else {
      const text = element("div", { class: message.role === "tool" ? "result mono" : "bubble" }, message.content);
      article.append(message.role === "tool" ? element("p", { class: "result-name" }, name) : "", text, this.tools(message));
    }
    return article;
  }

  // --- replies --------------------------------------------------------------------------------------

  reply(message, parts, isLast) {
    parts.thinking = element("div", { class: "thinking-text" });
    parts.thinkingName = element("span", {});
    parts.details = element("details", { class: "thinking" }, element("summary", {}, parts.thinkingName), parts.thinking);
    parts.text = element("div", { class: "text" });
    parts.calls = element("div", { class: "calls" });
    parts.end = element("div", { class: "end" });
    parts.article.append(parts.details, parts.text, parts.calls, parts.end);
    this.fillReply(message, parts);
    if (message === this.running) {
      parts.article.setAttribute("aria-busy", "true");
      return;
    }
    parts.end.append(figures(message), this.problem(message), this.tools(message));
    if (isLast && message.calls?.length && message.state === "done") parts.calls.append(this.resultForm(message));
  }

  fillReply(message, parts) {
    const isRunning = message === this.running;
    parts.details.hidden = !message.thinking;
    if (message.thinking) {
      const isThinking = isRunning && !message.content && !message.calls;
      const took = message.figures?.thinkingSeconds;
      parts.thinkingName.textContent = isThinking ? "Thinking…" : took ? `Thought for ${seconds(took)}` : "Thoughts";
      parts.thinking.textContent = message.thinking.trim();
    }
    showMarkdown(parts.text, message.content);
    parts.text.classList.toggle("waiting", isRunning && !message.content && !message.thinking && !message.calls);
    parts.text.classList.toggle("writing", isRunning && message.content !== "");
    parts.calls.replaceChildren(...(message.calls ?? []).filter(Boolean).map(callBlock));
  }

  problem(message) {
    const stopped = message.state === "stopped" && "You stopped this reply, or left the page.";
    const cut = message.state === "done" && message.finish === "length" && "The reply reached the limit of its tokens, or of the context.";
    if (message.state !== "failed") return stopped || cut ? element("p", { class: "muted note" }, stopped || cut) : "";
    const retry = button("Try again", () => this.actions.retry(message), { "data-action": "retry", disabled: this.running !== null });
    return element("div", { class: "failure" }, element("p", {}, message.error ?? "The reply failed."), retry);
  }

  resultForm(message) {
    const fields = message.calls.map((call, index) => {
      const id = `result-${index}`;
      const field = element("textarea", { id, rows: 2, class: "mono", placeholder: "What the tool returned" });
      return { call, field, node: element("div", {}, element("label", { for: id }, `Result of ${call.name}`), field) };
    });
    const onsubmit = (event) => {
      event.preventDefault();
      this.actions.sendResults(message, fields.map(({ call, field }) => ({ call, text: field.value })));
    };
    const send = element("button", { type: "submit", class: "primary" }, fields.length > 1 ? "Send results" : "Send result");
    return element("form", { class: "results", onsubmit }, fields.map(({ node }) => node), element("div", { class: "row end" }, send));
  }

  // --- what can be done with a message ----------------------------------------------------------------

  tools(message) {
    const isBusy = this.running !== null;
    const tools = element("div", { class: "message-tools" });
    const branches = siblings(this.conversation, message.parent);
    if (branches.length > 1) tools.append(this.branchSwitch(message, branches));
    if (message.content) {
      const copy = button("Copy", () => copyText(message.content, copy), { class: "quiet", "data-action": "copy" });
      tools.append(copy);
    }
    const attributes = { class: "quiet", disabled: isBusy };
    if (message.role === "user") {
      tools.append(button("Edit", () => this.edit(message), { ...attributes, "data-action": "edit" }));
    } else if (message.role === "assistant") {
      tools.append(button("Regenerate", () => this.actions.regenerate(message), { ...attributes, "data-action": "regenerate" }));
    }
    return tools;
  }

  branchSwitch(message, branches) {
    const at = branches.indexOf(message);
    const go = (step, name) => () => this.actions.choose(branches[at + step], name);
    const isBusy = this.running !== null;
    const step = (sign, label, offset, name) =>
      button(sign, go(offset, name), {
        class: "quiet step",
        "aria-label": label,
        "data-action": name,
        disabled: isBusy || !branches[at + offset],
      });
    return element(
      "span",
      { class: "branches", role: "group", "aria-label": "Versions" },
      step("‹", "Previous version", -1, "previous"),
      element("span", {}, `${at + 1} / ${branches.length}`),
      step("›", "Next version", 1, "next"),
    );
  }

  /** Show a message of the person in a field. */
  edit(message) {
    if (this.running) return;
    this.editing = message.id;
    this.show(this.conversation, this.running);
    const field = this.byId.get(message.id).article.querySelector("textarea");
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  editor(message) {
    const field = element("textarea", { "aria-label": "Edit the message", rows: Math.min(message.content.split("\n").length + 1, 16) });
    field.value = message.content;
    const leave = () => {
      this.editing = null;
      this.show(this.conversation, this.running);
      this.focusOn(message.id, "edit");
    };
    const onsubmit = (event) => {
      event.preventDefault();
      if (!field.value.trim()) return;
      this.editing = null;
      this.actions.edit(message, field.value);
    };
    const form = element(
      "form",
      { class: "editor", onsubmit },
      field,
      element(
        "div",
        { class: "row end" },
        element("span", { class: "muted" }, "The present version is kept."),
        button("Cancel", leave),
        element("button", { type: "submit", class: "primary" }, "Send"),
      ),
    );
    field.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    return form;
  }
}

function callBlock(call) {
  let text = call.arguments;
  try {
    text = JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    // Arguments that are not JSON are shown as they are.
  }
  return element(
    "div",
    { class: "call" },
    element("p", { class: "call-name" }, element("span", { class: "muted" }, "Call of "), element("code", {}, call.name)),
    element("pre", { tabindex: "0", role: "group", "aria-label": `Arguments of ${call.name}` }, element("code", {}, text)),
  );
}

function figures(message) {
  if (!message.figures) return "";
  const { cache, rest } = figuresText(message.figures);
  if (!cache && !rest.length) return "";
  const line = element("p", { class: "figures" });
  if (message.figures.prompt) {
    const bar = element("span", { class: "share", "aria-hidden": "true", title: `${percent(message.figures.cached, message.figures.prompt)} cached` });
    bar.style.setProperty("--share", String(message.figures.cached / message.figures.prompt));
    line.append(bar);
  }
  line.append(element("span", { class: "figures-cache" }, cache), element("span", { class: "figures-rest" }, rest.join(" · ")));
  return line;
}

function emptyState() {
  return element(
    "div",
    { class: "empty" },
    element("p", { class: "empty-title" }, "Ask something"),
    element("p", { class: "muted" }, "Each reply shows how much of its prompt the cache had. The cache keeps prompts over a restart of the server."),
  );
}

/** Return the last message of the person that is shown, if any. */
export function lastUserMessage(conversation) {
  return shownMessages(conversation).findLast((message) => message.role === "user") ?? null;
}

export function lastMessageId(conversation) {
  return shownMessages(conversation).at(-1)?.id ?? ROOT;
}
