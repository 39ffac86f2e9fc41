// Runs replies: sends a conversation, and adds what the server streams to its last message.

import { ApiError, streamChat } from "./api.js";
import { addMessage, requestMessages, save } from "./conversations.js";
import { figuresOf } from "./numbers.js";
import { requestOptions, toolsProblem } from "./settings.js";

/** A reply that is being written, or was. */
class Reply {
  constructor(conversation, parent) {
    this.conversation = conversation;
    this.controller = new AbortController();
    this.message = addMessage(conversation, parent, { role: "assistant", content: "", state: "stopped" });
    this.began = performance.now();
    this.firstToken = null;
    this.thinkingEnd = null;
  }

  /** Add a chunk of the stream to the message. */
  add(chunk) {
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    const { message } = this;
    if (delta.content || delta.reasoning_content || delta.tool_calls) this.firstToken ??= this.elapsed();
    if (delta.reasoning_content) message.thinking = (message.thinking ?? "") + delta.reasoning_content;
    if (delta.content || delta.tool_calls) this.thinkingEnd ??= this.elapsed();
    if (delta.content) message.content += delta.content;
    for (const call of delta.tool_calls ?? []) this.addCall(call);
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (chunk.timings) this.timings = chunk.timings;
    if (chunk.usage) this.usage = chunk.usage;
  }

  addCall(part) {
    this.message.calls ??= [];
    const call = (this.message.calls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
    if (part.id) call.id = part.id;
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }

  elapsed() {
    return (performance.now() - this.began) / 1000;
  }

  figures() {
    // A tool call arrives as a whole, once its last token is written.
    const isCall = this.message.calls && !this.message.content && !this.message.thinking;
    const first = isCall && this.timings ? this.timings.prompt_ms / 1000 : this.firstToken;
    const figures = figuresOf(this.usage, this.timings, first);
    if (this.message.thinking) figures.thinkingSeconds = (this.thinkingEnd ?? this.elapsed()) - (this.firstToken ?? 0);
    return figures;
  }
}

/** The replies that run, one in each conversation at most. The handlers store conversations at the start and the end. */
export class Replies {
  constructor({ onStart, onChange, onEnd }) {
    this.handlers = { onStart, onChange, onEnd };
    this.running = new Map();
  }

  /** Return the message that is being written in a conversation, if any. */
  runningMessage(conversation) {
    return this.running.get(conversation.id)?.message ?? null;
  }

  /** Return the object of a conversation whose reply runs: there must be only one that changes. */
  liveConversation(id) {
    return this.running.get(id)?.conversation ?? null;
  }

  stop(conversation) {
    this.running.get(conversation.id)?.controller.abort();
  }

  /** Stop a reply whose conversation was deleted: its end must not store the conversation again. */
  forget(id) {
    const reply = this.running.get(id);
    if (!reply) return;
    reply.isForgotten = true;
    reply.controller.abort();
  }

  /** Store what has arrived, before the page goes. */
  saveAll() {
    for (const reply of this.running.values()) if (!reply.isForgotten) save(reply.conversation);
  }

  /** Add a reply below a message, and return once it has ended. */
  async run(conversation, parent) {
    if (this.running.has(conversation.id)) return;
    const reply = new Reply(conversation, parent);
    this.running.set(conversation.id, reply);
    this.handlers.onStart(reply);
    try {
      for await (const chunk of streamChat(requestBody(conversation, parent), reply.controller.signal)) {
        reply.add(chunk);
        this.handlers.onChange(reply);
      }
      reply.message.state = "done";
    } catch (error) {
      if (error.name !== "AbortError") {
        reply.message.state = "failed";
        reply.message.error = error instanceof ApiError || error instanceof SettingsError ? error.message : String(error);
        reply.needsKey = error.status === 401;
      }
    } finally {
      if (reply.message.calls) reply.message.calls = reply.message.calls.filter(Boolean);
      reply.message.figures = reply.figures();
      conversation.updated = Date.now();
      this.running.delete(conversation.id);
      if (!reply.isForgotten) this.handlers.onEnd(reply);
    }
  }
}

class SettingsError extends Error {}

function requestBody(conversation, parent) {
  const problem = toolsProblem(conversation.settings.tools);
  if (problem) throw new SettingsError(`${problem} See the settings.`);
  return {
    messages: requestMessages(conversation, parent),
    stream: true,
    stream_options: { include_usage: true },
    // The server keeps the context of a conversation in the model's cells for as long as there is room.
    prompt_cache_key: conversation.id,
    ...requestOptions(conversation.settings),
  };
}
