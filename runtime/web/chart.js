// The moving chart of one camera: scores as a line, thresholds dashed, NG as dots, UNKNOWN as ticks at the bottom.
const SVG = "http://www.w3.org/2000/svg";
const PAD = { left: 4, right: 46, top: 8, bottom: 6 };

const element = (name, attributes, text) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

export const short = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(2);
  return value.toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
};

// history: [timestamp, score, threshold, label], oldest first; capacity: samples that fill the width.
export function draw(svg, history, capacity) {
  const width = svg.clientWidth || 400, height = svg.clientHeight || 96;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const values = history.flatMap(([, score, threshold]) => [score, threshold]).filter((v) => v !== null);
  if (values.length === 0) {
    svg.replaceChildren(element("text", { x: PAD.left, y: height / 2 }, "no scores yet"));
    return;
  }
  const least = Math.min(...values), most = Math.max(...values);
  const margin = (most - least || Math.abs(most) || 1) * 0.1;
  const low = least >= 0 && least < most * 0.5 ? 0 : least - margin, high = most + margin;
  const inner = width - PAD.left - PAD.right;
  const x = (index) => PAD.left + (inner * (index + capacity - history.length)) / Math.max(1, capacity - 1);
  const y = (value) => PAD.top + (height - PAD.top - PAD.bottom) * (1 - (value - low) / (high - low));
  const parts = [element("line", { class: "base", x1: PAD.left, x2: width - PAD.right, y1: height - PAD.bottom, y2: height - PAD.bottom })];
  parts.push(element("path", { class: "limit", d: path(history, 2, x, y) }));
  parts.push(element("path", { class: "score-line", d: path(history, 1, x, y) }));
  history.forEach(([, score, , label], index) => {
    if (label === "NG" && score !== null) parts.push(element("circle", { class: "ng", cx: x(index), cy: y(score), r: 3 }));
    if (label === "UNKNOWN") parts.push(element("rect", { class: "unknown", x: x(index) - 1.5, y: height - PAD.bottom - 9, width: 3, height: 9 }));
  });
  const [, score, threshold] = history[history.length - 1];
  if (threshold !== null) parts.push(element("text", { class: "limit-text", x: width - PAD.right + 5, y: y(threshold) + 4 }, short(threshold)));
  if (score !== null && (threshold === null || Math.abs(y(score) - y(threshold)) > 12)) {
    parts.push(element("text", { x: width - PAD.right + 5, y: y(score) + 4 }, short(score)));
  }
  svg.setAttribute("aria-label", `last ${history.length} scores; now ${short(score)}, threshold ${short(threshold)}`);
  svg.replaceChildren(...parts);
}

function path(history, column, x, y) {
  let pen = false;
  return history
    .map((sample, index) => {
      if (sample[column] === null) {
        pen = false;
        return "";
      }
      const step = `${pen ? "L" : "M"}${x(index).toFixed(1)} ${y(sample[column]).toFixed(1)}`;
      pen = true;
      return step;
    })
    .join("");
}
