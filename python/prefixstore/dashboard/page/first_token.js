// Times to the first token, a dot for each request, cold above warm, on a logarithmic scale.

import { byId, line, plot, rect, setEmpty, setFigure, setText, svg, text } from "./draw.js";
import { amount, count, plural, ratioWords, seconds } from "./format.js";

const ROW_HEIGHT = 76;
const LEFT = 44;
const RIGHT = 14;
const KINDS = ["cold", "warm"];

export class FirstTokenView {
  constructor() {
    this.groups = null;
    this.redraw = plot(byId("first-plot"), (width) => this.draw(width));
  }

  update(groups) {
    this.groups = groups;
    const { cold, warm } = groups;
    const isEmpty = cold.num_requests + warm.num_requests === 0;
    setEmpty("first-empty", isEmpty ? "No request has been answered yet." : null, byId("first-plot"));
    setText("first-words", words(cold, warm));
    byId("first-plot").setAttribute("aria-label", KINDS.map((kind) => describe(kind, groups[kind])).join("; "));
    setFigure("tile-warm", warm.num_requests > 0 ? seconds(warm.p50_s) : "–");
    setText("tile-warm-note", cold.num_requests > 0 && warm.num_requests > 0
      ? `${ratioWords(cold.p50_s, warm.p50_s)} than cold: ${seconds(cold.p50_s)}`
      : "median; none to compare with yet");
    this.redraw();
  }

  draw(width) {
    const height = KINDS.length * ROW_HEIGHT + 24;
    const all = this.groups === null ? [] : KINDS.flatMap((kind) => this.groups[kind].seconds);
    if (all.length === 0) return [height];
    const low = Math.floor(Math.log10(Math.min(...all)) - 0.05);
    const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...all)) + 0.05));
    const place = (value) => LEFT + (Math.log10(value) - low) / (high - low) * (width - LEFT - RIGHT);
    const decades = Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i));
    return [
      height,
      ...decades.flatMap((value) => [
        line(place(value), 4, place(value), height - 22, "grid"),
        text(place(value), height - 6, seconds(value), value === decades.at(-1) ? "end" : "middle"),
      ]),
      ...KINDS.flatMap((kind, row) => this.drawRow(kind, row * ROW_HEIGHT, width, place)),
    ];
  }

  drawRow(kind, top, width, place) {
    const group = this.groups[kind];
    const middle = top + ROW_HEIGHT / 2 + 8;
    const shapes = [
      text(0, middle + 4, kind, "start", "label strong"),
      line(LEFT, middle, width - RIGHT, middle, "grid"),
    ];
    if (group.num_requests === 0) return [...shapes, text(LEFT + 8, middle - 8, `no ${kind} request yet`)];
    group.seconds.forEach((value, i) => {
      // Spread by the golden ratio: dots of the same time lie beside each other, always the same way.
      const spread = ((i * 0.618) % 1 - 0.5) * 26;
      shapes.push(svg("circle", { cx: place(value), cy: middle + spread, r: 3, class: `dot dot-${kind}` }));
    });
    const isClose = Math.abs(place(group.p95_s) - place(group.p50_s)) < 150;
    return [
      ...shapes,
      ...this.drawMark(place(group.p50_s), top, middle, `p50 ${seconds(group.p50_s)}`, isClose ? "end" : "middle", width),
      ...this.drawMark(place(group.p95_s), top, middle, `p95 ${seconds(group.p95_s)}`, isClose ? "start" : "middle", width),
    ];
  }

  drawMark(x, top, middle, label, anchor, width) {
    const reach = 7 * label.length;
    const shift = anchor === "end" ? -3 : anchor === "start" ? 3 : 0;
    // Near an edge the label turns inward.
    const [at, side] = x + reach > width && anchor !== "end" ? [width, "end"]
      : x - reach < LEFT && anchor === "end" ? [LEFT, "start"] : [x + shift, anchor];
    return [
      rect(x - 1, middle - 19, 2, 38, "mark"),
      text(at, anchor === "start" ? middle + 32 : top + 20, label, side, "label strong"),
    ];
  }
}

function words(cold, warm) {
  const meaning = "A request is warm when at least half of its prompt was reused.";
  if (cold.num_requests === 0 || warm.num_requests === 0) return meaning;
  return `Warm requests begin to answer ${ratioWords(cold.p50_s, warm.p50_s)}: half of the`
    + ` ${count(warm.num_requests)} within ${seconds(warm.p50_s)}, half of the ${count(cold.num_requests)}`
    + ` cold ones within ${seconds(cold.p50_s)} (prompts of ${amount(warm.median_prompt_tokens)} and`
    + ` ${amount(cold.median_prompt_tokens)} tokens, medians). ${meaning}`;
}

function describe(kind, group) {
  if (group.num_requests === 0) return `no ${kind} request yet`;
  return `${plural(group.num_requests, `${kind} request`)}: half within ${seconds(group.p50_s)}, 95 percent within ${seconds(group.p95_s)}`;
}
