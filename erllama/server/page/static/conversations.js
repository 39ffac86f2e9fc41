// Conversations, and where the browser keeps them.
//
// A conversation is a tree of messages. An edit, or another reply, adds a branch beside the present one; `chosen` says
// which branch is shown. Parents stand before their children in `messages`.

const PREFIX = "erllama.conversation.";
export const FORMAT = "erllama-conversations-1";
export const MAX_IMPORT_BYTES = 64 * 1024 * 1024;
const ROLES = ["user", "assistant", "tool"];
const STATES = ["done", "stopped", "failed"];
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const TEXTS = ["model", "system", "thinking", "tools"];
export const ROOT = "";

let memory = null; // used where the browser keeps nothing for the page

export function newConversation(settings = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: { ...settings }, messages: [], chosen: {} };
}

function newId() {
  // Not randomUUID: a page that was loaded over plain HTTP from another machine has none.
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// --- messages -------------------------------------------------------------------------------------

/** Add a message below another (ROOT for the first), and show its branch. */
export function addMessage(conversation, parent, message) {
  const added = { id: newId(), parent, state: "done", ...message };
  conversation.messages.push(added);
  conversation.chosen[parent] = added.id;
  conversation.updated = Date.now();
  return added;
}

/** Return the messages with the same parent, in the order in which they were made. */
export function siblings(conversation, parent) {
  return conversation.messages.filter((message) => message.parent === parent);
}

/** Return the messages that are shown, from the first to the last. */
export function shownMessages(conversation) {
  const children = Map.groupBy
    ? Map.groupBy(conversation.messages, (message) => message.parent)
    : groupByParent(conversation.messages);
  const found = [];
  for (let parent = ROOT; children.has(parent); parent = found.at(-1).id) {
    const choices = children.get(parent);
    found.push(choices.find((message) => message.id === conversation.chosen[parent]) ?? choices.at(-1));
  }
  return found;
}

function groupByParent(messages) {
  const groups = new Map();
  for (const message of messages) groups.set(message.parent, [...(groups.get(message.parent) ?? []), message]);
  return groups;
}

/** Remove a message that has no children, such as a reply that failed before its first word. */
export function removeLeaf(conversation, message) {
  conversation.messages = conversation.messages.filter((each) => each !== message);
  if (conversation.chosen[message.parent] === message.id) delete conversation.chosen[message.parent];
}

/** Return the messages up to one of them, in the API's form. */
export function requestMessages(conversation, last) {
  const shown = shownMessages(conversation);
  const upTo = shown.slice(0, shown.findIndex((message) => message.id === last) + 1);
  const system = conversation.settings.system;
  return [...(system ? [{ role: "system", content: system }] : []), ...upTo.map(requestMessage)];
}

function requestMessage(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.callId, content: message.content };
  if (message.role === "user") return { role: "user", content: message.content };
  const made = { role: "assistant", content: message.content };
  if (message.thinking) made.reasoning_content = message.thinking;
  if (message.calls?.length) {
    made.tool_calls = message.calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  }
  return made;
}

/** Return the name of a conversation: the one it was given, or the start of its first message. */
export function titleOf(conversation) {
  const first = conversation.messages[0]?.content.trim().replace(/\s+/g, " ") ?? "";
  return conversation.title || (first.length > 60 ? `${first.slice(0, 59)}…` : first) || "New conversation";
}

// --- storage --------------------------------------------------------------------------------------

/** Return all stored conversations, the latest first. Entries that are damaged are left out. */
export function loadAll() {
  const found = [];
  try {
    for (let i = 0; i < localStorage.length; i += 1) {
      const key = localStorage.key(i);
      if (!key.startsWith(PREFIX)) continue;
      const conversation = readConversation(parsed(localStorage.getItem(key)));
      if (conversation && PREFIX + conversation.id === key) found.push(conversation);
    }
  } catch {
    memory ??= new Map();
    found.push(...memory.values());
  }
  return found.sort((one, other) => other.updated - one.updated);
}

/** Return a stored conversation; null if it is gone. */
export function load(id) {
  try {
    return readConversation(parsed(localStorage.getItem(PREFIX + id)));
  } catch {
    return memory?.get(id) ?? null;
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Store a conversation. Returns why it could not be stored, in plain words, or "". */
export function save(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return "";
  } catch (error) {
    memory ??= new Map();
    memory.set(conversation.id, conversation);
    return error.name === "QuotaExceededError"
      ? "The browser has no more room for conversations. Export and delete some; this one is lost when you leave."
      : "The browser stores nothing for this page. Conversations are lost when you leave.";
  }
}

export function remove(id) {
  memory?.delete(id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // It was in memory alone.
  }
}

/** Return the id of the conversation that a change of the storage, by another tab, is about; null for other changes. */
export function changedConversation(event) {
  return event.key?.startsWith(PREFIX) ? event.key.slice(PREFIX.length) : null;
}

// --- files ----------------------------------------------------------------------------------------

export function exportText(conversations) {
  return JSON.stringify({ format: FORMAT, conversations }, null, 1);
}

/** Return the conversations of a file, with new ids. Throws Error, in plain words, if it is not such a file. */
export function importText(text) {
  const file = parsed(text);
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error("This file has no conversations of this page. Choose a file that it exported.");
  }
  const found = file.conversations.map(readConversation);
  if (found.includes(null)) throw new Error("A conversation of this file is damaged, so none was imported.");
  return found.map((conversation) => ({ ...conversation, id: newId() }));
}

/** Return a conversation of a file or the storage with its known fields alone; null if one has a wrong type. */
function readConversation(value) {
  if (!isObject(value) || !isText(value.id) || !Array.isArray(value.messages)) return null;
  const messages = [];
  const known = new Set([ROOT]);
  for (const each of value.messages) {
    const message = readMessage(each);
    if (!message || known.has(message.id) || !known.has(message.parent)) return null;
    known.add(message.id);
    messages.push(message);
  }
  const chosen = {};
  for (const [parent, child] of Object.entries(isObject(value.chosen) ? value.chosen : {})) {
    if (known.has(parent) && known.has(child)) chosen[parent] = child;
  }
  const settings = readSettings(value.settings);
  const [created, updated] = [value.created, value.updated].map((time) => (Number.isFinite(time) ? time : 0));
  return { id: value.id, title: isText(value.title) ? value.title : "", created, updated, settings, messages, chosen };
}

function readMessage(value) {
  if (!isObject(value) || !ROLES.includes(value.role)) return null;
  if (!isText(value.id) || !isText(value.parent) || !isText(value.content)) return null;
  const { id, parent, role, content } = value;
  const message = { id, parent, role, content, state: STATES.includes(value.state) ? value.state : "done" };
  for (const name of ["thinking", "error", "callId", "name", "finish"]) if (isText(value[name])) message[name] = value[name];
  if (Array.isArray(value.calls)) {
    const calls = value.calls.map((call) => ({ id: call?.id, name: call?.name, arguments: call?.arguments }));
    if (!calls.every((call) => isText(call.id) && isText(call.name) && isText(call.arguments))) return null;
    message.calls = calls;
  }
  if (isObject(value.figures)) message.figures = readFigures(value.figures);
  return message;
}

function readFigures(value) {
  const figures = {};
  for (const name of ["firstToken", "prompt", "cached", "reply", "perSecond", "thinkingSeconds"]) {
    if (Number.isFinite(value[name])) figures[name] = value[name];
  }
  if (isText(value.tier)) figures.tier = value.tier;
  return figures;
}

export function readSettings(value) {
  const settings = {};
  for (const name of NUMBERS) if (Number.isFinite(value?.[name])) settings[name] = value[name];
  for (const name of TEXTS) if (isText(value?.[name])) settings[name] = value[name];
  return settings;
}

function isText(value) {
  return typeof value === "string";
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
