// Makes elements. Texts become text nodes, and no function here parses markup.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element with attributes, handlers (functions, such as `onclick`) and children (nodes or texts). */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Return an element of SVG; as `element`. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
  made.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Return a button with a text. `label` is its name for screen readers, if the text alone is unclear. */
export function button(text, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, ...attributes }, text);
}

export function byId(id) {
  return document.getElementById(id);
}

/** Return whether a key belongs to an input method. Safari reports its last Enter with the code 229 alone. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Copy a text, and show for a moment on the button that it was copied. */
export async function copyText(text, from) {
  let shown = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    shown = copyBySelection(text) ? "Copied" : "Not copied";
  }
  const before = from.dataset.text ?? from.textContent;
  from.dataset.text = before;
  from.textContent = shown;
  setTimeout(() => {
    from.textContent = before;
  }, 1500);
}

/** Copy by a selection: a page that was loaded over plain HTTP from another machine has no clipboard object. */
function copyBySelection(text) {
  const field = element("textarea", { class: "hidden", "aria-hidden": "true" });
  field.value = text;
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  try {
    return document.execCommand("copy");
  } finally {
    field.remove();
    focused?.focus();
  }
}
