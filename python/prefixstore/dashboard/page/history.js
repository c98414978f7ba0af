// The last 15 minutes: shares of prompt tokens by place, output tokens a second, requests.

import { byId, el, line, plot, rect, setEmpty, text } from "./draw.js";
import { amount, percent, rate } from "./format.js";
import { inOrder, kindOf, sum, swatch, wordOf } from "./places.js";

const SHARE_HEIGHT = 150;
const TRACK_HEIGHT = 46;
const TITLE_HEIGHT = 28;
const LEFT = 44; // room for the axis' numbers

/**
 * What happened in each bin of `bin_s` seconds, oldest first, from counters that only grow. Bins
 * begin at multiples of their length, so that they do not change as time goes on.
 */
export function intoBins(history, bin_s) {
  const bins = new Map();
  const { taken_at: at } = history;
  const tiers = inOrder(history.hit_tokens);
  for (let i = 1; i < at.length; i += 1) {
    const start = Math.floor(at[i] / bin_s) * bin_s;
    if (!bins.has(start)) bins.set(start, { start, hits: {}, prompt: 0, output: 0, span_s: 0, running: 0, queued: 0 });
    const bin = bins.get(start);
    const grown = (column) => Math.max(0, column[i] - column[i - 1]);
    for (const [tier, column] of tiers) bin.hits[tier] = (bin.hits[tier] ?? 0) + grown(column);
    bin.prompt += grown(history.prompt_tokens);
    bin.output += grown(history.output_tokens);
    bin.span_s += at[i] - at[i - 1];
    bin.running = Math.max(bin.running, history.num_running[i]);
    bin.queued = Math.max(bin.queued, history.num_queued[i]);
  }
  return [...bins.values()];
}

/** `[place, tokens]` of a bin, nearest first, the computed ones last. */
function parts(bin) {
  return [...Object.entries(bin.hits), ["computed", Math.max(0, bin.prompt - sum(bin.hits))]];
}

function total(bin) {
  return parts(bin).reduce((all, [, tokens]) => all + tokens, 0);
}

function kindOfPart(name) {
  return name === "computed" ? "computed" : kindOf(name);
}

export class HistoryView {
  constructor() {
    this.host = byId("history-plot");
    this.history = null;
    this.bins = [];
    this.chosen = null; // the bin under the pointer or the keys, by its start
    this.legend = new Map();
    this.redraw = plot(this.host, (width) => this.draw(width));
    this.host.addEventListener("pointermove", (event) => this.point(event));
    this.host.addEventListener("pointerleave", () => this.choose(null));
    this.host.addEventListener("keydown", (event) => this.press(event));
    this.host.addEventListener("blur", () => this.choose(null));
  }

  update(history) {
    this.history = history;
    this.redraw();
    const isEmpty = history.taken_at.length < 2 || !this.bins.some((bin) => total(bin) + bin.output > 0);
    setEmpty("history-empty", isEmpty ? "No requests in the last 15 minutes." : null);
    this.updateLegend();
  }

  /** Output tokens a second over the last 15 seconds or so; null while there is nothing to tell. */
  outputRate() {
    if (this.history === null || this.history.taken_at.length < 2) return null;
    const { taken_at: at, output_tokens: output } = this.history;
    const first = Math.max(0, at.length - 4);
    return Math.max(0, output.at(-1) - output[first]) / (at.at(-1) - at[first]);
  }

  draw(width) {
    const height = SHARE_HEIGHT + 2 * (TITLE_HEIGHT + TRACK_HEIGHT) + 22;
    if (this.history === null) return [height];
    const span_s = this.history.span_s;
    this.bin_s = width < 600 ? 30 : 15;
    this.bins = intoBins(this.history, this.bin_s);
    const end = Math.ceil((this.history.taken_at.at(-1) ?? 0) / this.bin_s) * this.bin_s;
    const step = (width - LEFT) * this.bin_s / span_s;
    const shown = this.bins.filter((bin) => bin.start >= end - span_s);
    this.place = (start) => width - (end - start) / this.bin_s * step;
    const outputTop = SHARE_HEIGHT + TITLE_HEIGHT;
    const requestTop = outputTop + TRACK_HEIGHT + TITLE_HEIGHT;
    const chosen = shown.find((bin) => bin.start === this.chosen);
    return [
      height,
      chosen ? rect(this.place(chosen.start), 0, step, height - 22, "chosen") : "",
      ...[0, 0.5, 1].flatMap((share) => [
        line(LEFT, 6 + (1 - share) * (SHARE_HEIGHT - 6), width, 6 + (1 - share) * (SHARE_HEIGHT - 6), "grid"),
        text(LEFT - 6, 10 + (1 - share) * (SHARE_HEIGHT - 6), `${share * 100} %`, "end"),
      ]),
      ...shown.flatMap((bin) => this.drawShares(bin, step)),
      ...this.drawTrack(shown, step, width, outputTop, "Output tokens per second", [
        ["output", (bin) => bin.output / bin.span_s],
      ]),
      ...this.drawTrack(shown, step, width, requestTop, "Requests: running, and queued (outlined)", [
        ["running", (bin) => bin.running],
        ["queued", (bin) => bin.running + bin.queued],
      ]),
      ...this.drawTimes(width, height, span_s),
    ];
  }

  drawShares(bin, step) {
    const all = total(bin);
    const shapes = [];
    let top = SHARE_HEIGHT;
    if (all === 0) return shapes;
    for (const [name, tokens] of parts(bin)) {
      const height = tokens / all * (SHARE_HEIGHT - 6);
      top -= height;
      if (tokens > 0) {
        shapes.push(rect(this.place(bin.start) + 0.5, top, Math.max(1, step - 1), height, `fill-${kindOfPart(name)}`));
      }
    }
    return shapes;
  }

  drawTrack(bins, step, width, top, title, series) {
    const outermost = series.at(-1)[1];
    const largest = Math.max(1, ...bins.map(outermost));
    const bottom = top + TRACK_HEIGHT;
    const shapes = [
      text(LEFT, top - 7, title),
      text(LEFT - 6, top + 9, amount(Math.ceil(largest)), "end"),
      line(LEFT, top, width, top, "grid"),
      line(LEFT, bottom, width, bottom, "grid"),
    ];
    for (const [name, valueOf] of [...series].reverse()) {
      for (const bin of bins) {
        const height = valueOf(bin) / largest * TRACK_HEIGHT;
        if (height > 0) shapes.push(rect(this.place(bin.start) + 0.5, bottom - height, Math.max(1, step - 1), height, `track-${name}`));
      }
    }
    return shapes;
  }

  drawTimes(width, height, span_s) {
    return (width < 600 ? [0, 15] : [0, 5, 10, 15]).map((minutes) => {
      const x = width - minutes * 60 / span_s * (width - LEFT);
      const anchor = minutes === 0 ? "end" : minutes === 15 ? "start" : "middle";
      return text(x, height - 6, minutes === 0 ? "now" : `${minutes} min ago`, anchor);
    });
  }

  point(event) {
    const x = event.clientX - this.host.getBoundingClientRect().left;
    const bin = this.bins.findLast((one) => this.place(one.start) <= x);
    this.choose(bin ? bin.start : null);
  }

  press(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.choose(null);
    if (by === undefined || this.bins.length === 0) return;
    event.preventDefault();
    const now = this.bins.findIndex((bin) => bin.start === this.chosen);
    const next = now < 0 ? this.bins.length - 1 : Math.min(this.bins.length - 1, Math.max(0, now + by));
    this.choose(this.bins[next].start);
  }

  choose(start) {
    if (start === this.chosen) return;
    this.chosen = start;
    this.redraw();
    this.updateLegend();
  }

  /** The legend is the read-out too: shares of the chosen bin, or else of all 15 minutes. */
  updateLegend() {
    const bins = this.chosen === null ? this.bins : this.bins.filter((bin) => bin.start === this.chosen);
    const tokens = new Map([...Object.keys(this.history?.hit_tokens ?? {}), "computed"].map((name) => [name, 0]));
    for (const bin of bins) for (const [name, some] of parts(bin)) tokens.set(name, tokens.get(name) + some);
    const all = [...tokens.values()].reduce((so_far, some) => so_far + some, 0);
    const rows = inOrder(Object.fromEntries(tokens)).filter(([name]) => name !== "computed");
    rows.push(["computed", tokens.get("computed")]);
    const output = bins.reduce((so_far, bin) => so_far + bin.output, 0) / Math.max(1, bins.reduce((so_far, bin) => so_far + bin.span_s, 0));
    const when = this.chosen === null ? "15 minutes" : new Date(this.chosen * 1000).toLocaleTimeString("en-GB");
    byId("history-legend").replaceChildren(
      el("li", { class: "when", text: when }),
      ...rows.map(([name, some]) => el("li", {}, swatch(kindOfPart(name)),
        el("span", { text: wordOf(name) }),
        el("b", { text: all > 0 ? percent(some / all) : "–" }),
        el("span", { class: "quiet", text: `${amount(some)} tokens` }))),
      el("li", {}, el("span", { text: "output" }), el("b", { text: `${rate(output)} tokens/s` })));
  }
}
