// The last requests: where the time of each went, and where its prompt came from.

import { byId, el, setEmpty } from "./draw.js";
import { ago, amount, count, niceStep, percent, plural, seconds } from "./format.js";
import { inOrder, kindOf, sum, swatch, wordOf } from "./places.js";
import { nameOf } from "./reasons.js";

const FEW = 10;

export class RequestsView {
  constructor() {
    this.answer = null;
    this.showsAll = false;
    for (const input of document.querySelectorAll('input[name="reach"]')) {
      input.addEventListener("change", () => this.redraw());
    }
    byId("phase-legend").replaceChildren(...[
      ["phase-queue", "queued"], ["phase-lookup", "look-up"], ["phase-load", "load, in its tiers' colours"],
      ["phase-compute", "compute"], ["phase-decode", "answer"],
    ].map(([phase, words]) => el("li", {}, el("i", { class: `swatch ${phase}` }), el("span", { text: words }))));
  }

  update(answer) {
    this.answer = answer;
    this.redraw();
  }

  redraw() {
    if (this.answer === null) return;
    const { requests } = this.answer;
    setEmpty("request-empty", requests.length === 0
      ? "No request has finished yet. Send one:\n"
        + `$ curl ${location.origin}/v1/completions -H 'content-type: application/json' -d '{"prompt": "Once upon a time", "max_tokens": 32}'`
      : null, byId("request-list"), byId("request-axis"));
    const reach = document.querySelector('input[name="reach"]:checked').value;
    const shown = this.showsAll ? requests : requests.slice(0, FEW);
    const ends = shown.map(({ times }) => timeline(times, reach).end_s);
    const scale_s = 4 * niceStep(Math.max(0.001, ...ends) / 4);
    byId("request-axis").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((share) =>
      el("span", { text: seconds(share * scale_s), style: { left: `${share * 100}%` } })));
    const now_s = Date.now() / 1000;
    const rows = shown.map((request) => this.row(request, reach, scale_s, now_s));
    if (requests.length > FEW) rows.push(this.moreButton(requests.length));
    const hadFocus = document.activeElement?.id === "request-more";
    byId("request-list").replaceChildren(...rows);
    if (hadFocus) byId("request-more").focus();
  }

  moreButton(total) {
    const button = el("button", { type: "button", id: "request-more", text: this.showsAll ? `Show only ${FEW}` : `Show all ${total}` });
    button.addEventListener("click", () => {
      this.showsAll = !this.showsAll;
      this.redraw();
    });
    return el("li", { class: "more" }, button);
  }

  row(request, reach, scale_s, now_s) {
    const { times } = request;
    const reused = sum(request.reused_tokens);
    return el("li", { class: "request" },
      el("div", { class: "request-who" },
        el("b", { text: request.request_id }),
        el("span", { class: "quiet", text: [request.tenant, ago(now_s - times.arrived_at)].filter(Boolean).join(" · ") })),
      el("div", { class: "request-when" },
        lanes(request, reach, scale_s),
        el("p", { class: "quiet", text: timeWords(request) })),
      el("div", { class: "request-what" },
        el("p", {}, el("b", { text: percent(reused / Math.max(1, request.prompt_tokens)) }),
          el("span", { text: ` of ${plural(request.prompt_tokens, "token")} reused` })),
        tokenBar(request),
        el("p", { class: "quiet", text: missWords(request) })));
  }
}

/** When each phase of a request begins and how long it takes, in seconds since it arrived. */
function timeline(times, reach) {
  const looked_up = times.queue_s + times.lookup_s;
  // Loading begins when the plan is made; computing ends with the first token.
  const compute_from = Math.max(looked_up, times.ttft_s - times.compute_s);
  return {
    queue: [0, times.queue_s],
    lookup: [times.queue_s, times.lookup_s],
    load: [looked_up, times.load_s],
    compute: [compute_from, times.compute_s],
    decode: [times.ttft_s, reach === "whole" ? times.decode_s : 0],
    end_s: Math.max(times.ttft_s, looked_up + times.load_s) + (reach === "whole" ? times.decode_s : 0),
  };
}

function lanes(request, reach, scale_s) {
  const phases = timeline(request.times, reach);
  const piece = (name, [from_s, length_s], className = `phase-${name}`) => length_s <= 0 ? "" : el("span", {
    class: `piece ${className}`,
    style: { left: `${100 * from_s / scale_s}%`, width: `max(1px, ${100 * length_s / scale_s}%)` },
  });
  return el("div", { class: "lanes", "aria-hidden": "true" },
    el("div", { class: "lane" }, piece("queue", phases.queue), piece("lookup", phases.lookup),
      ...loadPieces(request, phases.load).map(([kind, span]) => piece("load", span, `phase-load fill-${kind}`))),
    el("div", { class: "lane" }, piece("compute", phases.compute), piece("decode", phases.decode)));
}

/** The load in the colours of the tiers it came from, as long as their shares of its tokens. */
function loadPieces(request, [from_s, length_s]) {
  const loaded = inOrder(request.reused_tokens).filter(([tier]) => tier !== "device");
  const total = loaded.reduce((all, [, tokens]) => all + tokens, 0);
  if (total === 0) return length_s > 0 ? [["remote", [from_s, length_s]]] : [];
  let at_s = from_s;
  return loaded.map(([tier, tokens]) => {
    const span = [at_s, length_s * tokens / total];
    at_s += span[1];
    return [kindOf(tier), span];
  });
}

function timeWords({ times, num_preemptions: preemptions, output_tokens: output }) {
  const words = [
    ["queued", times.queue_s], ["look-up", times.lookup_s], ["load", times.load_s],
    ["compute", times.compute_s],
  ].filter(([, value]) => value > 0).map(([name, value]) => `${name} ${seconds(value)}`);
  if (times.ttft_s > 0) words.unshift(`first token ${seconds(times.ttft_s)}`);
  else words.unshift("no answer");
  if (output > 0) words.push(`${plural(output, "token")}${times.decode_s > 0 ? ` in ${seconds(times.decode_s)}` : ""}`);
  if (preemptions > 0) words.push(`set aside ${plural(preemptions, "time")} for ${seconds(times.preempted_s)}`);
  return words.join(" · ");
}

function tokenBar(request) {
  const total = Math.max(1, request.prompt_tokens);
  const piece = (kind, tokens) => el("span", { class: `piece-inline fill-${kind}`, style: { width: `${100 * tokens / total}%` } });
  return el("div", { class: "token-bar", "aria-hidden": "true" },
    ...inOrder(request.reused_tokens).map(([tier, tokens]) => piece(kindOf(tier), tokens)),
    piece("computed", request.recomputed_tokens));
}

function missWords(request) {
  const places = inOrder(request.reused_tokens).filter(([, tokens]) => tokens > 0)
    .map(([tier, tokens]) => `${amount(tokens)} from ${wordOf(tier)}`);
  const misses = Object.entries(request.misses).map(([reason, tokens]) => `${nameOf(reason)} ${amount(tokens)}`);
  const computed = `${count(request.recomputed_tokens)} computed${misses.length > 0 ? ` (${misses.join(", ")})` : ""}`;
  const saved = request.saved_s > 0.0005 ? [`saved ${seconds(request.saved_s)}`] : [];
  return [...places, computed, ...saved].join(" · ");
}
