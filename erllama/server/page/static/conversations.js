// Conversations, and where the browser keeps them.
//
// A conversation is a tree of messages. An edit, or another reply, adds a branch beside the present one; `chosen` says
// which branch is shown. Parents stand before their children in `messages`. `removed` has the ids of removed messages:
// several tabs may change a conversation, and each adds what the others stored before it writes.

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
  return { id: newId(), title: "", created: now, updated: now, settings: { ...settings }, messages: [], chosen: {}, removed: [] };
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

/** Remove a message, such as a reply that failed before its first word. A message with children stays. */
export function removeLeaf(conversation, message) {
  if (siblings(conversation, message.id).length) return;
  conversation.removed.push(message.id);
  conversation.messages = conversation.messages.filter((each) => each !== message);
  if (conversation.chosen[message.parent] === message.id) delete conversation.chosen[message.parent];
}

/** Return whether a reply has no text and no calls, such as one that failed before its first word. */
export function isEmptyReply(message) {
  return message.role === "assistant" && !message.content && !message.calls?.length;
}

/** Return the messages up to one of them, in the API's form. */
export function requestMessages(conversation, last) {
  const shown = shownMessages(conversation);
  const upTo = shown.slice(0, shown.findIndex((message) => message.id === last) + 1);
  const system = conversation.settings.system;
  return [...(system ? [{ role: "system", content: system }] : []), ...upTo.filter((message) => !isEmptyReply(message)).map(requestMessage)];
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

/** Return all stored conversations, the latest first. Parts that are damaged are left out. */
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

/**
 * Add to a conversation what another tab stored.
 *
 * Messages of both stay. Of two states of one reply, the later one stays. A removed message returns if the other tab has
 * answered it. The branches that this tab shows, its title and its settings stay.
 */
export function addStored(conversation, stored) {
  const own = new Map(conversation.messages.map((message) => [message.id, message]));
  const added = stored.messages.filter((message) => !own.has(message.id));
  const all = [...conversation.messages, ...added];
  const parents = new Set(all.map((message) => message.parent));
  const removed = new Set([...conversation.removed, ...stored.removed].filter((id) => !parents.has(id)));
  const messages = all.filter((message) => !removed.has(message.id));
  for (const message of stored.messages) {
    const mine = own.get(message.id);
    if (mine && isLater(message, mine)) Object.assign(mine, message);
  }
  const chosen = { ...stored.chosen, ...conversation.chosen };
  for (const [parent, child] of Object.entries(chosen)) if (removed.has(child)) delete chosen[parent];
  const updated = Math.max(conversation.updated, stored.updated);
  Object.assign(conversation, { messages, chosen, updated, removed: [...removed] });
}

/**
 * Return whether what is stored lacks messages, or ends of replies, that this tab has.
 *
 * Two tabs that write at the same moment do not see each other's change, so the later one loses the earlier one's. A
 * reply that still runs does not count: it is stored at its end.
 */
export function hasUnstored(conversation, stored, running) {
  const known = new Map(stored.messages.map((message) => [message.id, message]));
  return conversation.messages.some((message) => {
    if (message === running) return false;
    const theirs = known.get(message.id);
    return !theirs || isLater(message, theirs);
  });
}

/** Return whether a state of a reply is later than another: the end of the reply, or more of it. */
function isLater(one, other) {
  const [isEnd, wasEnd] = [one, other].map(({ state, figures }) => state !== "stopped" || figures !== undefined);
  if (isEnd !== wasEnd) return isEnd;
  const [length, before] = [one, other].map(({ content, thinking }) => content.length + (thinking?.length ?? 0));
  return !isEnd && length > before;
}

/** Take over the title and the settings that another tab stored. The object of the settings stays. */
export function takeSettings(conversation, stored) {
  conversation.title = stored.title;
  for (const name of Object.keys(conversation.settings)) delete conversation.settings[name];
  Object.assign(conversation.settings, stored.settings);
}

/**
 * Store a conversation, with what other tabs added to it since.
 *
 * Returns why it could not be stored, in plain words, or "".
 */
export function save(conversation) {
  try {
    const stored = readConversation(parsed(localStorage.getItem(PREFIX + conversation.id)));
    if (stored) addStored(conversation, stored);
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return "";
  } catch (error) {
    memory ??= new Map();
    memory.set(conversation.id, conversation);
    return error.name === "QuotaExceededError"
      ? "The browser has no more room for conversations. Export and delete some; what is not stored is lost when you leave."
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
  const found = file.conversations.map((each) => readConversation(each, { isStrict: true }));
  if (found.includes(null)) throw new Error("A conversation of this file is damaged, so none was imported.");
  return found.map((conversation) => ({ ...conversation, id: newId() }));
}

/**
 * Return a conversation of a file or the storage with its known fields alone; null if it cannot be read.
 *
 * Messages that cannot be read are left out, and one whose parent is missing follows the message before it. With
 * `isStrict`, such a conversation cannot be read.
 */
function readConversation(value, { isStrict = false } = {}) {
  if (!isObject(value) || !isText(value.id) || !Array.isArray(value.messages)) return null;
  const messages = [];
  const known = new Set([ROOT]);
  for (const each of value.messages) {
    const message = readMessage(each);
    const isSound = message && !known.has(message.id) && known.has(message.parent);
    if (!isSound && isStrict) return null;
    if (!message || known.has(message.id)) continue;
    if (!isSound) message.parent = messages.at(-1)?.id ?? ROOT;
    known.add(message.id);
    messages.push(message);
  }
  if (value.messages.length && !messages.length) return null;
  const chosen = {};
  for (const [parent, child] of Object.entries(isObject(value.chosen) ? value.chosen : {})) {
    if (known.has(parent) && known.has(child)) chosen[parent] = child;
  }
  const settings = readSettings(value.settings);
  const [created, updated] = [value.created, value.updated].map((time) => (Number.isFinite(time) ? time : 0));
  const removed = Array.isArray(value.removed) ? value.removed.filter((id) => isText(id) && !known.has(id)) : [];
  const title = isText(value.title) ? value.title : "";
  return { id: value.id, title, created, updated, settings, messages, chosen, removed };
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
