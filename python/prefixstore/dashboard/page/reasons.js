// Why tokens were computed, and what the planner chose.

import { bars, byId, el, setEmpty } from "./draw.js";
import { amount, bytes, count, percent, seconds } from "./format.js";
import { inOrder, sum, titleOf } from "./places.js";

const PLANS = {
  none: "Nothing to load.",
  recompute: "Computing again was reckoned faster than loading.",
  load: "All that the tiers held was loaded.",
  both: "Computed from the front while loading from the back.",
};

// What each reason means, and what helps.
const REASONS = {
  new: ["never seen", "Nobody computed it before. What prompts share should come first in them."],
  evicted: ["evicted", "It was here once. More room in the pool or a tier would keep it."],
  lost: ["lost", "A tier promised it and did not give it, or gave it wrong: see the tier's errors."],
  late: ["late", "It was being loaded; computing it was done first."],
  cheaper: ["cheaper to compute", "A tier holds it; loading it would have taken longer."],
  unreachable: ["tier unreachable", "A tier that may hold it gave no answer."],
  quarantined: ["quarantined", "It was found wrong, or one before it. What tiers hold of it is not used."],
  no_room: ["no room", "A tier holds it; the pool had no blocks left. A larger pool helps."],
  window: ["window gone", "A sliding window's blocks before the prefix's end were evicted."],
};

export function showMisses(overview) {
  const total = sum(overview.miss_tokens);
  const rows = Object.entries(overview.miss_tokens).filter(([, tokens]) => tokens > 0);
  bars(byId("miss-list"), rows.map(([reason, tokens]) => ({
    name: nameOf(reason),
    value: tokens,
    shown: `${amount(tokens)} tokens`,
    note: `${percent(tokens / total)}. ${Object.hasOwn(REASONS, reason) ? REASONS[reason][1] : ""}`,
  })));
  setEmpty("miss-empty", rows.length === 0 ? "Nothing was missed yet." : null, byId("miss-list"));
}

export function nameOf(word) {
  return Object.hasOwn(REASONS, word) ? REASONS[word][0] : word.replaceAll("_", " ");
}

/** The planner's choices; of those that were carried out, what it had predicted and what came. */
export function showPlanner(overview) {
  const planner = overview.planner ?? { modes: {} };
  const rows = Object.entries(planner.modes).filter(([, mode]) => mode.num_plans > 0);
  const total = rows.reduce((all, [, mode]) => all + mode.num_plans, 0);
  const slowest = Math.max(...rows.map(([, mode]) => Math.max(mean(mode, "predicted_s"), mean(mode, "measured_s"))), 1e-9);
  byId("plan-list").replaceChildren(...rows.map(([name, mode]) =>
    el("li", {},
      el("span", { class: "bar-name", text: name }),
      el("span", { class: "bar-value", text: `${count(mode.num_plans)} (${percent(mode.num_plans / total)})` }),
      ...(mode.num_finished > 0 ? [
        twin("predicted", mean(mode, "predicted_s") / slowest),
        twin("measured", mean(mode, "measured_s") / slowest),
      ] : []),
      el("span", { class: "bar-note", text: planWords(name, mode) }))));
  setEmpty("plan-empty", rows.length === 0 ? "No request was planned yet." : null, byId("plan-list"), byId("plan-facts"));
  byId("plan-facts").replaceChildren(...facts(planner).flatMap(([name, value]) =>
    [el("dt", { text: name }), el("dd", { text: value })]));
}

function twin(name, share) {
  return el("span", { class: "bar-track", "aria-hidden": "true" },
    el("span", { class: `bar-fill ${name}`, style: { width: `${100 * share}%` } }));
}

function mean(mode, field) {
  return mode.num_finished > 0 ? mode[field] / mode.num_finished : 0;
}

function planWords(name, mode) {
  const meaning = Object.hasOwn(PLANS, name) ? PLANS[name] : "";
  if (mode.num_finished === 0) return meaning;
  const error = mode.p50_error === null ? "" : `; half came within ${percent(mode.p50_error)}`;
  return `${meaning} Predicted ${seconds(mean(mode, "predicted_s"))}, took ${seconds(mean(mode, "measured_s"))} on average${error}.`;
}

function facts(planner) {
  const tiers = inOrder(planner.tiers ?? {}).filter(([, tier]) => tier.num_calls > 0);
  return [
    ...tiers.map(([name, tier]) => [`${titleOf(name)} loads`, `${bytes(tier.bytes_per_s)}/s after ${seconds(tier.latency_s)}`]),
    ...(planner.prefill?.num_passes > 0 ? [["A token computes in", seconds(planner.prefill.token_s)]] : []),
    ...(planner.num_given_up > 0 ? [["Loads given up", count(planner.num_given_up)]] : []),
  ];
}
