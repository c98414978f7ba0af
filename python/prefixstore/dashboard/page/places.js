// The places KV can come from: their order, words and colours, the same all over the page.

import { el } from "./draw.js";

const KINDS = ["device", "memory", "disk", "redis", "remote"];
const TITLES = { device: "Device pool", memory: "Host memory", disk: "Disk", redis: "Redis" };
const WORDS = { device: "device pool", memory: "host memory", disk: "disk", redis: "Redis" };

/** The kind of a tier by its name, which is its kind unless somebody chose another. */
export function kindOf(name) {
  const found = KINDS.find((kind) => name.toLowerCase().includes(kind));
  return found ?? (name.toLowerCase().includes("valkey") ? "redis" : "remote");
}

export function titleOf(name) {
  return Object.hasOwn(TITLES, name) ? TITLES[name] : name;
}

export function wordOf(name) {
  return Object.hasOwn(WORDS, name) ? WORDS[name] : name;
}

/** Nearest first: a place's entries `[name, value]` in the order of its kind. */
export function inOrder(table) {
  const rank = ([name]) => KINDS.indexOf(kindOf(name));
  return Object.entries(table).sort((a, b) => rank(a) - rank(b));
}

export function sum(table) {
  return Object.values(table).reduce((total, value) => total + value, 0);
}

export function swatch(kind) {
  return el("span", { class: `swatch fill-${kind}`, "aria-hidden": "true" });
}
