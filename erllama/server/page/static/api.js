// The server's API: requests with the client's key, streams of events, and errors in plain words.

const KEY = "erllama.key";
let memoryKey = "";

/** Return the key that the person entered; "" without one. It lives as long as the tab. */
export function getKey() {
  try {
    return sessionStorage.getItem(KEY) ?? memoryKey;
  } catch {
    return memoryKey;
  }
}

export function setKey(key) {
  memoryKey = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // The browser keeps nothing for this page: the key is gone after a reload.
  }
}

/**
 * An answer other than success, or none.
 *
 * `code` is the server's, or "unreachable" or "cut_off". `status` is 0 if there was no answer.
 */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Send a request and return its response. Throws ApiError, or AbortError if `signal` ended it. */
async function send(path, { body, signal } = {}) {
  const headers = {};
  const key = getKey();
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

function unreachable() {
  const text = "The server cannot be reached. It may have stopped, or the connection is down.";
  return new ApiError(text, { code: "unreachable" });
}

async function errorOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // A proxy answered: there is only the status.
  }
  const after = Number(response.headers.get("retry-after"));
  const wait = after > 0 ? ` Try again in ${after} s.` : "";
  return new ApiError(sentence(error.message ?? `The server answered with status ${response.status}`) + wait, {
    status: response.status,
    code: error.code ?? "",
  });
}

function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

export async function getJson(path) {
  const response = await send(path);
  return await response.json();
}

/** Yield the chunks of a chat completion. Throws ApiError if the server ends the stream with an error, or early. */
export async function* streamChat(body, signal) {
  const response = await send("/v1/chat/completions", { body, signal });
  try {
    for await (const text of events(response.body)) {
      if (text === "[DONE]") return;
      const chunk = JSON.parse(text);
      if (chunk.error) {
        throw new ApiError(sentence(chunk.error.message ?? "The reply failed"), { code: chunk.error.code ?? "" });
      }
      yield chunk;
    }
  } catch (error) {
    throw error.name === "AbortError" || error instanceof ApiError ? error : cutOff();
  }
  throw cutOff();
}

function cutOff() {
  return new ApiError("The connection ended before the reply did.", { code: "cut_off" });
}

/** Yield the data of each server-sent event of a stream of bytes. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let lines = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) {
        const line = part.endsWith("\r") ? part.slice(0, -1) : part;
        if (line.startsWith("data:")) lines.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
