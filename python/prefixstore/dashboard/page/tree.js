// The tree of cached prefixes: a bar for each run, as long as it has tokens, prompts from left to
// right. Where prompts part, the bar forks; its colour says how long ago it was touched.

import { byId, el, line, plot, rect, setEmpty, setText, text } from "./draw.js";
import { amount, count, niceStep, plural } from "./format.js";

const AGES = [4, 16, 64, 256]; // bounds of the heats, in look-ups and inserts
const AXIS_HEIGHT = 22;
const GAP = 6; // between namespaces

export class TreeView {
  constructor() {
    this.host = byId("tree-plot");
    this.tree = null;
    this.nodes = [];
    this.chosen = null; // a node, by the place where it begins and what it begins with
    this.redraw = plot(this.host, (width) => this.draw(width));
    this.host.addEventListener("pointermove", (event) => {
      const place = event.target.dataset?.place;
      if (place !== undefined) this.choose(this.nodes[Number(place)]);
    });
    this.host.addEventListener("keydown", (event) => this.press(event));
    byId("tree-heat").replaceChildren(
      el("span", { text: "touched within the last" }),
      ...AGES.map((age, heat) => el("span", {}, el("i", { class: `swatch heat-${heat}` }), el("span", { text: `${age}` }))),
      el("span", {}, el("i", { class: `swatch heat-${AGES.length}` }), el("span", { text: "or more look-ups and inserts" })),
      el("span", {}, el("i", { class: "swatch pinned" }), el("span", { text: "in use" })),
      el("span", {}, el("i", { class: "swatch folded" }), el("span", { text: "others, folded" })));
  }

  update(tree) {
    const before = this.nodes[this.chosen];
    this.tree = tree;
    this.nodes = arrange(tree);
    // The same run may have another place now.
    const again = before && this.nodes.find((node) => node.handle === before.handle && node.is_folded === before.is_folded);
    this.chosen = again ? again.place : null;
    setEmpty("tree-empty", this.nodes.length === 0
      ? "Nothing is cached yet. Prompts of at least one block of tokens appear here when they were computed." : null,
      this.host, byId("tree-heat"), byId("tree-detail"));
    setText("tree-words", "Prompts read from left to right; where two differ, the bar forks."
      + ` ${plural(tree.num_tokens, "token")} in ${plural(tree.num_runs, "run")}`
      + `${tree.num_salts > 1 ? ` of ${count(tree.num_salts)} namespaces` : ""}.`);
    setText("tree-detail", again ? this.describe(again) : "Point at a bar, or use the arrow keys.");
    setText("text-note", tree.shows_text ? " but for the first words of cached prefixes" : "");
    this.redraw();
  }

  draw(width) {
    const roots = this.nodes.filter((node) => node.above === null);
    const num_leaves = roots.reduce((sum, root) => sum + root.leaves, 0);
    if (num_leaves === 0) return [1];
    const tall = Math.min(420, Math.max(130, num_leaves * 13));
    const longest = Math.max(...this.nodes.map((node) => node.first + node.own));
    const place = (tokens) => tokens / longest * (width - 1);
    const unit = (tall - GAP * (countSalts(roots) - 1)) / num_leaves;
    const shapes = [];
    let top = 0;
    roots.forEach((root, i) => {
      if (i > 0 && roots[i - 1].salt !== root.salt) top += GAP;
      this.drawNode(root, top, unit, place, shapes);
      top += root.leaves * unit;
    });
    return [tall + AXIS_HEIGHT, ...this.drawAxis(longest, place, tall, width), ...shapes];
  }

  drawNode(node, top, unit, place, shapes) {
    const height = node.leaves * unit;
    const [x, width] = [place(node.first), place(node.own)];
    const gap = Math.min(1, height / 4);
    const kind = node.is_folded ? "folded" : `heat-${heatOf(node.age)}`;
    const classes = `run ${kind}${node.pins > 0 ? " pinned" : ""}${node.place === this.chosen ? " is-chosen" : ""}`;
    shapes.push(rect(x + 0.5, top + gap / 2, Math.max(1, width - 1), height - gap, classes, { "data-place": node.place, rx: Math.min(2, height / 4) }));
    if (width > 64 && height > 15) {
      const label = node.is_folded ? `${amount(node.runs)} others` : amount(node.own);
      shapes.push(text(x + 7, top + height / 2 + 4, label, "start", `run-label on-${kind}`));
    }
    let below = top;
    for (const child of node.below) {
      this.drawNode(child, below, unit, place, shapes);
      below += child.leaves * unit;
    }
  }

  drawAxis(longest, place, tall, width) {
    const step = Math.ceil(niceStep(longest / Math.max(2, Math.floor(width / 130))));
    const shapes = [];
    for (let tokens = 0; tokens <= longest; tokens += step) {
      const isLast = place(tokens) > width - 40;
      shapes.push(line(place(tokens), 0, place(tokens), tall, "grid"),
        text(place(tokens), tall + 16, tokens === 0 ? "token 0" : amount(tokens), tokens === 0 ? "start" : isLast ? "end" : "middle"));
    }
    return shapes;
  }

  press(event) {
    const node = this.nodes[this.chosen];
    const row = node ? node.row : this.nodes.filter((one) => one.above === null);
    const next = {
      ArrowRight: node ? node.below[0] : row[0],
      ArrowLeft: node?.above ?? row[0],
      ArrowDown: node ? row[row.indexOf(node) + 1] : row[0],
      ArrowUp: node ? row[row.indexOf(node) - 1] : row[0],
    };
    if (!Object.hasOwn(next, event.key)) return;
    event.preventDefault();
    if (next[event.key]) this.choose(next[event.key]);
  }

  choose(node) {
    if (node === undefined || node.place === this.chosen) return;
    this.chosen = node.place;
    for (const shape of this.host.querySelectorAll(".is-chosen")) shape.classList.remove("is-chosen");
    this.host.querySelector(`[data-place="${node.place}"]`)?.classList.add("is-chosen");
    setText("tree-detail", this.describe(node));
  }

  describe(node) {
    const salt = this.tree.salts[node.salt];
    if (node.is_folded) return `${plural(node.runs, "other run")} of ${plural(node.tokens, "token")} together, too small to draw.`;
    return [
      `Tokens ${count(node.first)} to ${count(node.first + node.own)} (${count(node.own)})`,
      `depth ${node.depth}`,
      node.subtree > node.own ? `${amount(node.subtree)} with all that go on from here` : "",
      node.age === 0 ? "touched last" : `touched ${count(node.age)} look-ups and inserts ago`,
      node.pins > 0 ? `held by ${plural(node.pins, "request")}` : "",
      salt ? `namespace ${salt}` : "",
      node.text ? `begins “${node.text}”` : "",
    ].filter(Boolean).join(" · ");
  }
}

/** Nodes with their children, largest first, and a leaf for what was folded. */
function arrange(tree) {
  const nodes = tree.nodes.map((one) => ({
    first: one.first_tokens, own: one.own_tokens, subtree: one.below_tokens, salt: one.salt, age: one.age,
    pins: one.pins, text: one.text, handle: one.handle, is_folded: false, above: null, below: [],
    others: { runs: one.folded_runs, tokens: one.folded_tokens },
  }));
  const roots = [];
  nodes.forEach((node, i) => {
    const above = nodes[tree.nodes[i].parent];
    node.above = above ?? null;
    (above ? above.below : roots).push(node);
  });
  for (const node of [...nodes]) addFolded(node.others, node, node.below);
  addFolded({ runs: tree.folded_runs, tokens: tree.folded_tokens }, null, roots);
  rankSalts(nodes, roots);
  return number(roots);
}

/** Numbers the namespaces anew, the largest first. */
function rankSalts(nodes, roots) {
  const sizes = new Map();
  for (const root of roots) sizes.set(root.salt, (sizes.get(root.salt) ?? 0) + root.subtree);
  const order = [...sizes].sort((a, b) => b[1] - a[1]).map(([salt]) => salt);
  for (const node of nodes) node.rank = order.indexOf(node.salt);
}

function addFolded({ runs, tokens }, above, row) {
  if (runs === 0) return;
  const first = above ? above.first + above.own : 0;
  row.push({
    is_folded: true, runs, tokens, first, own: tokens / runs, subtree: 0, age: 0, pins: 0,
    salt: above?.salt, rank: Infinity, handle: above?.handle, above, below: [],
  });
}

/** All nodes, each with its `place`, `depth`, the `row` of its siblings, and its `leaves`. */
function number(roots) {
  const all = [];
  const stack = [[roots, 1]];
  while (stack.length > 0) {
    const [row, depth] = stack.pop();
    row.sort((a, b) => a.is_folded - b.is_folded || (depth === 1 ? a.rank - b.rank : 0) || b.subtree - a.subtree);
    for (const node of row) {
      Object.assign(node, { place: all.length, depth, row });
      all.push(node);
      if (node.below.length > 0) stack.push([node.below, depth + 1]);
    }
  }
  for (const node of [...all].reverse()) node.leaves = Math.max(1, node.below.reduce((sum, one) => sum + one.leaves, 0));
  return all;
}

function heatOf(age) {
  const heat = AGES.findIndex((bound) => age <= bound);
  return heat < 0 ? AGES.length : heat;
}

function countSalts(roots) {
  return new Set(roots.map((root) => root.salt)).size;
}
