// What each place holds, of what it may hold, and whether it answers.

import { byId, el } from "./draw.js";
import { amount, bytes, count, percent, plural } from "./format.js";
import { kindOf, swatch, titleOf } from "./places.js";

export function showTiers(overview) {
  const rows = [poolRow(overview.pool), ...overview.tiers.map(tierRow)];
  if (overview.write_queue.num_blocks > 0) {
    const { num_blocks: blocks, bytes: size } = overview.write_queue;
    rows.push(el("li", { class: "tier-note", text: `${plural(blocks, "block")} (${bytes(size)}) waiting to be written` }));
  }
  if (overview.tiers.length === 0) {
    rows.push(el("li", { class: "tier-note", text: "Only the device pool: what leaves it is computed again. Give the cache a tier, such as memory://4GiB, to keep it." }));
  }
  if (overview.num_audits > 0 || overview.num_quarantined > 0) rows.push(auditNote(overview));
  byId("tier-list").replaceChildren(...rows);
}

/** What was computed once more and compared, and what of it was wrong. */
function auditNote({ num_audits: audits, audited_blocks: blocks, num_quarantined: wrong }) {
  const done = `${plural(audits, "prompt")} audited: ${plural(blocks, "reused block")} computed again`;
  if (wrong === 0) return el("li", { class: "tier-note", text: `${done}, none wrong` });
  return el("li", { class: "tier-note" },
    el("span", { text: `${done}; ` }),
    el("span", { class: "tier-troubles", text: `${plural(wrong, "block")} quarantined: look at the log` }));
}

function poolRow(pool) {
  const tokens = (blocks) => `${amount(blocks * pool.block_size)} tokens`;
  return row({
    name: "device",
    share: pool.used_blocks / pool.num_blocks,
    amounts: `${tokens(pool.used_blocks)} of ${tokens(pool.num_blocks)}`,
    facts: [`${plural(pool.cached_blocks, "block")} cached`, `${count(pool.evicted_blocks)} evicted`],
    state: "up",
  });
}

function tierRow(tier) {
  const isKnown = tier.used_bytes !== null;
  const isBounded = isKnown && tier.capacity_bytes > 0;
  const troubles = [
    ["num_errors", "failed call", "failed calls"],
    ["num_timeouts", "timeout", "timeouts"],
    ["num_corrupted", "corrupted record", "corrupted records"],
    ["num_dropped", "record not written", "records not written"],
  ].filter(([field]) => tier[field] > 0).map(([field, one, many]) => plural(tier[field], one, many));
  return row({
    name: tier.name,
    share: isBounded ? tier.used_bytes / tier.capacity_bytes : null,
    amounts: !isKnown ? "gave no answer" : `${bytes(tier.used_bytes)} of ${isBounded ? bytes(tier.capacity_bytes) : "no bound"}`,
    facts: [
      isKnown ? plural(tier.num_records, "record") : "",
      `${plural(tier.num_hits, "hit")}, ${bytes(tier.read_bytes)} read`,
      `${bytes(tier.written_bytes)} written`,
    ],
    troubles,
    state: tier.is_down ? "down" : isKnown ? "up" : "no answer",
  });
}

function row({ name, share, amounts, facts, troubles = [], state }) {
  const kind = kindOf(name);
  return el("li", { class: "tier", "data-state": state },
    el("span", { class: "tier-name" }, swatch(kind), el("span", { text: titleOf(name) })),
    el("span", { class: "tier-state", text: state }),
    el("span", { class: "tier-amount", text: share === null ? amounts : `${amounts} (${percent(share)})` }),
    el("span", { class: share === null ? "meter unbounded" : "meter", "aria-hidden": "true" },
      el("span", { class: `meter-fill fill-${kind}`, style: { width: `${100 * Math.min(1, share ?? 0)}%`, minWidth: share > 0 ? "2px" : "0" } })),
    el("span", { class: "tier-facts", text: facts.filter(Boolean).join(" · ") }),
    troubles.length > 0 ? el("span", { class: "tier-troubles", text: troubles.join(" · ") }) : "");
}
