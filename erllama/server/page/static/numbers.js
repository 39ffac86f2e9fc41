// Numbers as people read them, and the figures of a reply.

const WHOLE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

// Where a tier keeps its blocks, after "5,120 of 5,140 prompt tokens".
const FROM_TIER = { live: "from the context", ram: "from memory", ram_file: "from memory", disk: "from disk" };

export function whole(value) {
  return WHOLE.format(value);
}

export function plural(value, one, many = `${one}s`) {
  return `${whole(value)} ${value === 1 ? one : many}`;
}

/** Return bytes with a binary unit, such as "1.5 GiB". */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

/** Return a share as percent, without rounding up to 100 % or down to 0 %. */
export function percent(part, all) {
  if (!all) return "0 %";
  const value = (part / all) * 100;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  if (value < 100 && value > 99.9) return "> 99.9 %";
  return `${Number.isInteger(value) ? value : value.toFixed(1)} %`;
}

export function seconds(value) {
  if (value < 0.095) return `${Math.max(value, 0.01).toFixed(2)} s`;
  if (value < 60) return `${value.toFixed(1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
}

/**
 * Return the figures of a reply, as a conversation keeps them.
 *
 * `firstToken` is in seconds from the request to the first text, as the page saw it; null if there was none.
 */
export function figuresOf(usage, timings, firstToken) {
  const figures = { firstToken };
  if (usage) {
    figures.prompt = usage.prompt_tokens ?? 0;
    figures.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    figures.tier = usage.prompt_tokens_details?.cached_tier ?? null;
    figures.reply = usage.completion_tokens ?? 0;
  }
  if (timings?.predicted_per_second) figures.perSecond = timings.predicted_per_second;
  return figures;
}

/** Return the figures of a reply in words: what came from the cache, and then the rest. */
export function figuresText(figures) {
  const first = typeof figures.firstToken === "number" ? `first token after ${seconds(figures.firstToken)}` : "";
  if (typeof figures.prompt !== "number") return { cache: first, rest: [] };
  const from = figures.cached ? (FROM_TIER[figures.tier] ?? "from the cache") : "from the cache";
  const cached = `${whole(figures.cached)} of ${plural(figures.prompt, "prompt token")} ${from}`;
  const rest = [`${whole(figures.prompt - figures.cached)} computed`, plural(figures.reply, "reply token")];
  if (typeof figures.perSecond === "number") rest.push(`${figures.perSecond.toFixed(1)} tokens/s`);
  return { cache: first ? `${cached}, ${first}` : cached, rest };
}
