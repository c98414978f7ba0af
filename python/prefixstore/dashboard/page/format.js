// Numbers with their units, as short as they can be without becoming vague.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** Three significant digits, no exponent. */
function short(value) {
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

export function count(value) {
  return WHOLE.format(value);
}

export function amount(value) {
  if (value < 10_000) return WHOLE.format(value);
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= size) return `${short(value / size)} ${unit}`;
  }
  return WHOLE.format(value);
}

export function plural(value, one, many = `${one}s`) {
  return `${amount(value)} ${value === 1 ? one : many}`;
}

export function bytes(value) {
  for (const [power, unit] of [[4, "TiB"], [3, "GiB"], [2, "MiB"], [1, "KiB"]]) {
    if (value >= 1024 ** power) return `${short(value / 1024 ** power)} ${unit}`;
  }
  return `${WHOLE.format(value)} B`;
}

export function seconds(value) {
  if (value === 0) return "0 s";
  if (value < 0.001) return `${short(value * 1e6)} µs`;
  if (value < 1) return `${short(value * 1e3)} ms`;
  if (value < 120) return `${short(value)} s`;
  return value < 7200 ? `${short(value / 60)} min` : `${short(value / 3600)} h`;
}

export function percent(share) {
  if (share > 0 && share < 0.01) return "under 1 %";
  // 99.6 % is not 100 %: what is left over is the point.
  return share > 0.99 && share < 1 ? `${(Math.floor(share * 1000) / 10).toFixed(1)} %` : `${Math.round(share * 100)} %`;
}

export function rate(value) {
  return value > 0 && value < 10 ? value.toFixed(1) : WHOLE.format(value);
}

export function ago(past_s) {
  if (past_s < 1.5) return "now";
  return `${past_s < 120 ? Math.round(past_s) + " s" : past_s < 7200 ? Math.round(past_s / 60) + " min" : Math.round(past_s / 3600) + " h"} ago`;
}

/** "41 times sooner", or what is true instead. */
export function ratioWords(cold_s, warm_s) {
  const ratio = cold_s / warm_s;
  if (ratio >= 1.1) return `${ratio >= 10 ? Math.round(ratio) : ratio.toFixed(1)} times sooner`;
  if (ratio > 0.9) return "no sooner";
  return `${(1 / ratio).toFixed(1)} times later`;
}

/** A round number that is no less, for the distance of marks on an axis. */
export function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= rough * 0.9999);
}
