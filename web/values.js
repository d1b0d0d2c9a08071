// The text of `strengths`: "0: 0.5, 3: -0.2 @ 0.5-1" as a Map of {value, window}, and back.

const ENTRY = /^\s*(\d{1,6})\s*[:=]([^@]*)(?:@\s*(\d*\.?\d+|\d+\.)\s*-\s*(\d*\.?\d+|\d+\.)\s*)?$/;

/** Strengths by direction; what cannot be read is left out, since the server says so anyway. */
export function parse(text) {
  const found = new Map();
  for (const part of String(text ?? "").split(/[,;\n]/)) {
    const [, index, value, start, end] = part.match(ENTRY) ?? [];
    if (!value?.trim() || !Number.isFinite(Number(value))) continue;
    found.set(Number(index), { value: Number(value), window: start ? [Number(start), Number(end)] : null });
  }
  return found;
}

/** The inverse of `parse`. */
export function format(strengths) {
  return [...strengths]
    .sort((a, b) => a[0] - b[0])
    .map(([index, { value, window }]) => `${index}: ${value}${window ? ` @ ${window.join("-")}` : ""}`)
    .join(", ");
}

/** Four digits behind the point. */
export function round(value) {
  return Number(value.toFixed(4));
}
