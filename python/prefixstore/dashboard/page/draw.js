// Small functions that make elements. Text goes in as text alone: nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name === "style") Object.assign(element.style, value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function byId(id) {
  return document.getElementById(id);
}

/** Sets text where it changed, so that a screen reader and a selection are left alone. */
export function setText(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

/** A large figure, its unit smaller beside it. */
export function setFigure(id, words) {
  const [, figure, unit] = words.match(/^(\S+)\s*(.*)$/);
  byId(id).replaceChildren(el("span", { text: figure }), el("span", { class: "unit", text: unit }));
}

/** Shows `text` in place of a plot or list that has nothing to show; null shows the plot again. */
export function setEmpty(id, text, ...parts) {
  const element = byId(id);
  element.hidden = text === null;
  for (const part of parts) part.hidden = text !== null;
  if (text === null) return;
  const lines = text.split("\n").map((line) =>
    line.startsWith("$ ") ? el("code", { text: line.slice(2) }) : el("span", { text: line }));
  element.replaceChildren(...lines);
}

/**
 * An SVG that is as wide as its place and drawn anew when that changes. `draw(width)` returns
 * `[height, ...children]`.
 */
export function plot(host, draw) {
  let width = 0;
  const picture = svg("svg", { "aria-hidden": "true" });
  host.append(picture);
  const redraw = () => {
    if (width < 1) return;
    const [height, ...children] = draw(width);
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.setAttribute("width", width);
    picture.setAttribute("height", height);
    picture.replaceChildren(...children);
  };
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now === width) return;
    width = now;
    redraw();
  }).observe(host);
  return redraw;
}

export function rect(x, y, width, height, className, attributes = {}) {
  const size = { x, y, width: Math.max(0, width), height: Math.max(0, height) };
  return svg("rect", { ...size, class: className, ...attributes });
}

export function line(x1, y1, x2, y2, className) {
  return svg("line", { x1, y1, x2, y2, class: className });
}

export function text(x, y, content, anchor = "start", className = "label") {
  return svg("text", { x, y, "text-anchor": anchor, class: className, text: content });
}

/** Horizontal bars with a name, an amount and words about it. */
export function bars(list, rows) {
  const largest = Math.max(1, ...rows.map((row) => row.value));
  list.replaceChildren(...rows.map((row) =>
    el("li", {},
      el("span", { class: "bar-name", text: row.name }),
      el("span", { class: "bar-value", text: row.shown }),
      el("span", { class: "bar-track", "aria-hidden": "true" },
        el("span", { class: "bar-fill", style: { width: `${100 * row.value / largest}%` } })),
      el("span", { class: "bar-note", text: row.note ?? "" }))));
}
