// Starts the page: the conversations at the side, the composer, the views, the dialogs and the keys.

import { getJson, getKey, setKey } from "./api.js";
import { CacheView } from "./cache.js";
import * as store from "./conversations.js";
import { button, byId, element, isComposing } from "./dom.js";
import { MessageList, lastMessageId, lastUserMessage } from "./messages.js";
import { plural } from "./numbers.js";
import { Replies } from "./replies.js";
import { showSettings } from "./settings.js";

const THEMES = ["system", "light", "dark"];
const message = byId("message");
const model = byId("model");
let conversations = store.loadAll();
let current = conversations[0] ?? store.newConversation();
let models = [];
let shown = ""; // the outline of what the list shows
let dialogConversation = null;
const unsaved = new Map(); // why a conversation is not stored, by its id

const list = new MessageList(byId("messages"), byId("scroller"), {
  edit: (old, content) => reply(store.addMessage(current, old.parent, { role: "user", content }).id),
  regenerate: (old) => reply(old.parent),
  retry: (old) => {
    if (replies.runningMessage(current)) return;
    if (store.isEmptyReply(old) && !old.thinking) store.removeLeaf(current, old);
    reply(old.parent);
  },
  choose: (sibling, name) => {
    current.chosen[sibling.parent] = sibling.id;
    keep(current);
    show();
    list.focusOn(sibling.id, name);
  },
  sendResults: (old, results) => {
    let parent = old.id;
    for (const { call, text } of results) {
      parent = store.addMessage(current, parent, { role: "tool", content: text, callId: call.id, name: call.name }).id;
    }
    reply(parent);
  },
});

const replies = new Replies({
  onStart: ({ conversation }) => {
    keep(conversation);
    if (conversation !== current) return;
    say("Waiting for the first token…");
    show({ toEnd: true });
  },
  onChange: ({ conversation, message: changed }) => {
    if (conversation !== current) return;
    if (changed.content || changed.calls) say("Writing…");
    else if (changed.thinking) say("Thinking…");
    list.update(changed);
  },
  onEnd: (ended) => {
    keep(ended.conversation);
    if (ended.needsKey) askForKey();
    if (ended.conversation !== current) return showConversations();
    say(endText(ended));
    const atEnd = list.isAtEnd();
    show({ toEnd: atEnd });
    focusAfter(ended);
  },
});

/** Move the focus to what comes after a reply, but not from a person who types or is in a dialog. */
function focusAfter({ message: { calls, state } }) {
  const focused = document.activeElement;
  const isFree = focused === document.body || (focused === message && !message.value);
  if (!isFree || document.querySelector("dialog[open]")) return;
  if (calls?.length && state === "done") byId("result-0")?.focus();
  else message.focus();
}

function endText({ message: { state, figures } }) {
  if (state === "failed") return "The reply failed.";
  if (state === "stopped") return "Stopped.";
  return figures?.reply ? `Reply complete, ${plural(figures.reply, "token")}.` : "Reply complete.";
}

/** Announce what happens. Once for each state, and not for each token: screen readers read it aloud. */
function say(text) {
  const status = byId("status");
  if (status.textContent !== text) status.textContent = text;
}

/** Show a problem until the next one, beside the warning about conversations that are not stored. */
function notice(text) {
  const [unstored = ""] = unsaved.values();
  const all = [text, unstored].filter(Boolean).join(" ");
  if (byId("notice").textContent !== all) byId("notice").textContent = all;
  byId("notice").hidden = !all;
}

function keep(conversation) {
  const problem = store.save(conversation);
  if (problem) unsaved.set(conversation.id, problem);
  else unsaved.delete(conversation.id);
  notice("");
  if (!conversations.includes(conversation)) {
    conversations = [conversation, ...conversations.filter((each) => each.id !== conversation.id)];
  }
}

// --- the conversation -----------------------------------------------------------------------------

function show({ toEnd = false } = {}) {
  const running = replies.runningMessage(current);
  list.show(current, running);
  shown = outline(current);
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  showConversations();
  showModel();
  if (toEnd) list.scrollToEnd();
}

/** Return a text that is different once the messages that are shown, or their versions, are. */
function outline(conversation) {
  const messages = store.shownMessages(conversation);
  const nVersions = ({ parent }) => store.siblings(conversation, parent).length;
  return JSON.stringify(messages.map((each) => [each.id, each.state, each.content.length, nVersions(each)]));
}

function reply(parent) {
  list.editing = null;
  return replies.run(current, parent);
}

function open(conversation) {
  current = replies.liveConversation(conversation.id) ?? conversation;
  list.editing = null;
  say("");
  show({ toEnd: true });
  drawSettings();
  toggleSidebar(false);
}

function startConversation() {
  open(store.newConversation(current.settings));
  if (isCacheChosen()) location.hash = "#chat";
  message.focus();
}

function submit() {
  const text = message.value;
  if (!text.trim() || replies.runningMessage(current)) return;
  message.value = "";
  fitMessage();
  reply(store.addMessage(current, lastMessageId(current), { role: "user", content: text }).id);
}

function fitMessage() {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight, window.innerHeight * 0.4)}px`;
}

// --- the side -------------------------------------------------------------------------------------

function showConversations() {
  const sorted = [...conversations].sort((one, other) => other.updated - one.updated);
  const focused = document.activeElement?.closest("[data-conversation]")?.dataset.conversation;
  byId("conversations").replaceChildren(...sorted.map(conversationItem));
  if (focused) byId("conversations").querySelector(`[data-conversation="${focused}"] button`)?.focus();
}

function conversationItem(conversation) {
  const title = store.titleOf(conversation);
  const isCurrent = conversation.id === current.id;
  const state = replies.runningMessage(conversation) ? element("span", { class: "dot", role: "img", "aria-label": "writing" }) : null;
  return element(
    "li",
    { "data-conversation": conversation.id, class: isCurrent ? "current" : null },
    element("button", { type: "button", class: "open", "aria-current": isCurrent ? "true" : null, onclick: () => open(conversation) }, element("span", {}, title), state),
    button("···", () => askAbout(conversation), { class: "more", "aria-label": `Rename, export or delete: ${title}` }),
  );
}

function toggleSidebar(isOpen) {
  byId("sidebar").classList.toggle("open", isOpen);
  byId("menu").setAttribute("aria-expanded", String(isOpen));
}

function askAbout(conversation) {
  dialogConversation = conversation;
  byId("conversation-name").value = store.titleOf(conversation);
  byId("conversation-delete").textContent = "Delete";
  byId("conversation-dialog").showModal();
  byId("conversation-name").select();
}

function deleteConversation() {
  const { id } = dialogConversation;
  const ask = byId("conversation-delete");
  if (ask.textContent === "Delete") {
    ask.textContent = "Delete for good";
    return;
  }
  store.remove(id);
  leaveOut(id);
  // There may be room for others now.
  for (const each of conversations) if (unsaved.has(each.id)) keep(each);
}

/** Drop a conversation that was deleted, here or in another tab. */
function leaveOut(id) {
  replies.forget(id);
  unsaved.delete(id);
  notice("");
  conversations = conversations.filter((each) => each.id !== id);
  if (dialogConversation?.id === id) byId("conversation-dialog").close();
  if (current.id === id) open(conversations[0] ?? store.newConversation(current.settings));
  else showConversations();
}

function download(chosen, name) {
  const url = URL.createObjectURL(new Blob([store.exportText(chosen)], { type: "application/json" }));
  const link = element("a", { href: url, download: `${name.replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "conversation"}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

async function importFile(file) {
  try {
    if (file.size > store.MAX_IMPORT_BYTES) throw new Error("This file is larger than 64 MiB, the limit of an import.");
    const imported = store.importText(await file.text());
    for (const conversation of imported) keep(conversation);
    if (imported.length) open(imported[0]);
    say(`Imported ${plural(imported.length, "conversation")}.`);
  } catch (error) {
    notice(error.message);
  }
}

// --- models, settings, key ------------------------------------------------------------------------

async function loadModels() {
  try {
    models = (await getJson("/v1/models")).data;
    notice("");
  } catch (error) {
    if (error.status === 401) askForKey();
    else notice(error.message);
  }
  showModel();
}

function showModel() {
  const chosen = current.settings.model;
  const names = models.map((each) => each.id);
  if (chosen && names.length && !names.includes(chosen)) names.push(chosen);
  model.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  model.value = chosen ?? names[0] ?? "";
  model.hidden = !names.length;
}

function drawSettings(options) {
  if (byId("settings").hidden) return;
  const conversation = current;
  const onChange = () => {
    if (conversation.messages.length) keep(conversation);
  };
  showSettings(byId("settings"), conversation.settings, onChange, () => toggleSettings(false), options);
}

function toggleSettings(isOpen) {
  byId("settings").hidden = !isOpen;
  byId("settings-toggle").setAttribute("aria-expanded", String(isOpen));
  if (!isOpen) {
    byId("settings-toggle").focus();
    return;
  }
  drawSettings();
  byId("setting-system").focus({ preventScroll: true });
}

function askForKey() {
  const wasWrong = getKey() !== "";
  byId("key-title").textContent = wasWrong ? "The server does not know this key" : "This server needs a key";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

// --- theme and views ------------------------------------------------------------------------------

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
  byId("theme").title = `Theme: ${theme}`;
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % THEMES.length];
  showTheme(theme);
  try {
    localStorage.setItem("erllama.theme", theme);
  } catch {
    // It lasts until the page is left.
  }
}

const cacheView = new CacheView(byId("cache"), (error) => {
  if (error.status === 401) askForKey();
});

function isCacheChosen() {
  return location.hash === "#cache";
}

function showView() {
  const isCache = isCacheChosen();
  byId("chat").hidden = isCache;
  byId("sidebar").hidden = isCache;
  byId("menu").hidden = isCache;
  byId("settings-toggle").hidden = isCache;
  model.classList.toggle("out", isCache);
  if (isCache) byId("settings").hidden = true;
  byId("settings-toggle").setAttribute("aria-expanded", String(!byId("settings").hidden));
  document.querySelector(".skip").hidden = isCache;
  for (const [id, isShown] of [["to-chat", !isCache], ["to-cache", isCache]]) {
    if (isShown) byId(id).setAttribute("aria-current", "page");
    else byId(id).removeAttribute("aria-current");
  }
  document.title = isCache ? "Cache – erllama" : "erllama";
  cacheView.show(isCache);
}

// --- events ---------------------------------------------------------------------------------------

const SHORTCUTS = {
  KeyN: startConversation,
  KeyR: () => {
    if (isCacheChosen()) return;
    const last = store.shownMessages(current).at(-1);
    if (last?.role === "assistant") reply(last.parent);
  },
  KeyS: () => {
    if (!isCacheChosen()) toggleSettings(byId("settings").hidden);
  },
  KeyV: () => {
    location.hash = isCacheChosen() ? "#chat" : "#cache";
  },
};

function onKey(event) {
  if (isComposing(event) || document.querySelector("dialog[open]")) return;
  const isPlainAlt = event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey;
  // On Apple's keyboards, Option and a letter type another letter.
  const types = /Mac|iP/.test(navigator.platform) && event.target.matches?.("textarea, input");
  if (isPlainAlt && !types && SHORTCUTS[event.code]) {
    event.preventDefault();
    SHORTCUTS[event.code]();
  } else if (event.key === "Escape") {
    if (byId("sidebar").classList.contains("open")) {
      toggleSidebar(false);
      byId("menu").focus();
    } else replies.stop(current);
  }
}

function onMessageKey(event) {
  if (isComposing(event)) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && message.value === "") {
    const last = lastUserMessage(current);
    if (!last || replies.runningMessage(current)) return;
    event.preventDefault();
    list.edit(last);
  }
}

function onStorage(event) {
  const id = store.changedConversation(event);
  if (id === null) return;
  const stored = store.load(id);
  const wasShown = current;
  const own = [current, ...conversations].find((each) => each.id === id);
  if (stored) followStorage(own, stored);
  else if (event.newValue === null) {
    leaveOut(id);
    if (own === wasShown) say("Another tab deleted this conversation.");
  }
}

/** Show what another tab stored. `own` is the conversation as this tab has it, if it does: its object stays. */
function followStorage(own, stored) {
  if (own) {
    store.addStored(own, stored);
    store.takeSettings(own, stored);
    if (store.hasUnstored(own, stored, replies.runningMessage(own))) keep(own);
  } else conversations.push(stored);
  showConversations();
  if (own !== current) return;
  showModel();
  drawSettings({ keepsFocused: true });
  if (list.editing === null && outline(current) !== shown) show();
}

function connect() {
  const on = (id, name, handler) => byId(id).addEventListener(name, handler);
  const cancelling = (handler) => (event) => {
    event.preventDefault();
    handler();
  };
  on("composer", "submit", cancelling(submit));
  on("message", "keydown", onMessageKey);
  on("message", "input", fitMessage);
  on("stop", "click", () => {
    replies.stop(current);
    message.focus();
  });
  on("new", "click", startConversation);
  on("menu", "click", () => toggleSidebar(!byId("sidebar").classList.contains("open")));
  on("import", "click", () => byId("import-file").click());
  on("import-file", "change", ({ target }) => {
    if (target.files.length) importFile(target.files[0]);
    target.value = "";
  });
  on("export", "click", () => download(conversations, "erllama conversations"));
  on("model", "change", () => {
    current.settings.model = model.value;
    if (current.messages.length) keep(current);
  });
  on("settings-toggle", "click", () => toggleSettings(byId("settings").hidden));
  on("theme", "click", nextTheme);
  on("help", "click", () => byId("help-dialog").showModal());
  on("key-form", "submit", () => {
    setKey(byId("key").value.trim());
    byId("key").value = "";
    loadModels();
    cacheView.refreshWhileShown();
  });
  on("conversation-form", "submit", () => {
    dialogConversation.title = byId("conversation-name").value.trim();
    keep(dialogConversation);
    showConversations();
  });
  on("conversation-delete", "click", deleteConversation);
  on("conversation-export", "click", () => download([dialogConversation], store.titleOf(dialogConversation)));
  on("conversation-cancel", "click", () => byId("conversation-dialog").close());
  byId("scroller").parentElement.addEventListener("click", () => toggleSidebar(false));
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", showView);
  window.addEventListener("storage", onStorage);
  window.addEventListener("pagehide", () => replies.saveAll());
}

connect();
showTheme(document.documentElement.dataset.theme ?? "system");
show({ toEnd: true });
showView();
loadModels();
if (!byId("chat").hidden && matchMedia("(hover: hover)").matches) message.focus();
