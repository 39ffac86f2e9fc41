// The settings of a conversation: system prompt, sampling, thinking, tools. Empty fields are the server's defaults.

import { button, element } from "./dom.js";

// Name in the API, label, attributes of the field, and what it does.
const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 5, step: 0.05 }, "0 picks the likeliest token each time."],
  ["top_p", "Top p", { min: 0, max: 1, step: 0.01 }, ""],
  ["top_k", "Top k", { min: 0, step: 1 }, ""],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }, ""],
  ["max_tokens", "Max tokens", { min: 1, step: 1 }, ""],
  ["seed", "Seed", { min: 0, step: 1 }, "An equal seed repeats a reply."],
];
const THINKING = [
  ["", "Default of the model"],
  ["on", "On"],
  ["off", "Off"],
];
const EXAMPLE_TOOL = '[{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}]';

/**
 * Show the fields for some settings. `onChange` is called with the new settings after each change.
 *
 * With `keepsFocused`, the field in which a person types stays as it is; it must be one of the same settings.
 */
export function showSettings(panel, settings, onChange, onClose, { keepsFocused = false } = {}) {
  const change = (name, value) => {
    if (value === "" || value === null) delete settings[name];
    else settings[name] = value;
    onChange(settings);
  };
  const heading = element("h2", {}, "Settings");
  const close = button("Close", onClose, { class: "quiet" });
  const shown = [...panel.children];
  const nodes = [
    element("div", { class: "settings-head" }, heading, close),
    element("p", { class: "muted" }, "They apply to this conversation, from the next reply on. Empty fields are the server's defaults."),
    textField("system", "System prompt", 5, settings, change),
    element("div", { class: "numbers" }, NUMBERS.map((field) => numberField(field, settings, change))),
    thinkingField(settings, change),
    toolsField(settings, change),
  ];
  if (keepsFocused && panel.contains(document.activeElement)) {
    shown.forEach((node, index) => node.contains(document.activeElement) || node.replaceWith(nodes[index]));
  } else panel.replaceChildren(...nodes);
}

function textField(name, label, rows, settings, change) {
  const field = element("textarea", { id: `setting-${name}`, rows, spellcheck: "true" });
  field.value = settings[name] ?? "";
  field.addEventListener("change", () => change(name, field.value.trim() ? field.value : ""));
  return element("div", { class: "setting" }, element("label", { for: field.id }, label), field);
}

function numberField([name, label, limits, hint], settings, change) {
  const id = `setting-${name}`;
  const hintId = hint ? `${id}-hint` : null;
  const field = element("input", { type: "number", id, placeholder: "default", "aria-describedby": hintId, ...limits });
  field.value = settings[name] ?? "";
  field.addEventListener("change", () => {
    if (!field.checkValidity()) field.reportValidity();
    else change(name, field.value === "" ? "" : Number(field.value));
  });
  return element(
    "div",
    { class: "setting" },
    element("label", { for: id }, label),
    field,
    hint && element("p", { class: "muted", id: hintId }, hint),
  );
}

function thinkingField(settings, change) {
  const options = THINKING.map(([value, text]) => element("option", { value }, text));
  const field = element("select", { id: "setting-thinking" }, options);
  field.value = settings.thinking ?? "";
  field.addEventListener("change", () => change("thinking", field.value));
  return element("div", { class: "setting" }, element("label", { for: field.id }, "Thinking"), field);
}

function toolsField(settings, change) {
  const id = "setting-tools";
  const problem = element("p", { class: "problem", role: "alert", id: `${id}-problem` });
  const field = element("textarea", { id, rows: 5, spellcheck: "false", class: "mono", placeholder: EXAMPLE_TOOL, "aria-describedby": problem.id });
  field.value = settings.tools ?? "";
  const check = () => {
    problem.textContent = toolsProblem(field.value);
    field.setAttribute("aria-invalid", String(problem.textContent !== ""));
  };
  field.addEventListener("change", () => {
    check();
    change("tools", field.value.trim() ? field.value : "");
  });
  check();
  const hint = element("p", { class: "muted" }, "A list in the form of OpenAI. The page shows the calls, and you enter their results.");
  return element("div", { class: "setting" }, element("label", { for: id }, "Tools, as JSON"), field, problem, hint);
}

/** Return what is wrong with the text of the tools, in plain words; "" if nothing is. */
export function toolsProblem(text) {
  if (!text?.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "The tools must be a list: [ … ].";
  } catch (error) {
    return `The tools are not JSON: ${error.message}.`;
  }
}

/** Return the fields of a request that some settings stand for. */
export function requestOptions(settings) {
  const options = {};
  for (const [name] of NUMBERS) if (settings[name] !== undefined) options[name] = settings[name];
  if (settings.thinking) options.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  if (settings.tools) options.tools = JSON.parse(settings.tools);
  if (settings.model) options.model = settings.model;
  return options;
}
