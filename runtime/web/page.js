// The live page: asks for the state once a second and shows it. Everything shown is set as text, never as markup.
import { draw, short } from "/chart.js";

const PERIOD = 1000, PATIENCE = 4000, CHART = 120;
const $ = (id) => document.getElementById(id);
const cameras = new Map();
let lastContact = Date.now(), skew = 0;

const set = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const make = (name, text, className) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
};
const count = (value) => value.toLocaleString("en");
const duration = (seconds) => {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
};
const pairs = (list, rows) => list.replaceChildren(...rows.flatMap(([name, value, bad]) => [make("dt", name), make("dd", value, bad ? "bad" : "")]));

function card(name) {
  const node = $("camera").content.firstElementChild.cloneNode(true);
  const find = (selector) => node.querySelector(selector);
  const held = { node, find, seq: null, heat: true, loading: false };
  set(find(".name"), name);
  find("img").alt = `last judged picture of ${name}`;
  find(".heat").addEventListener("click", () => {
    held.heat = !held.heat;
    held.seq = null;
    find(".heat").setAttribute("aria-pressed", String(held.heat));
  });
  $("cameras").append(node);
  return held;
}

function picture(name, held, seq) {
  if (held.loading || held.seq === seq) return;
  held.loading = true;
  const image = new Image();
  image.onload = () => {
    held.find("img").src = image.src;
    held.find(".picture").classList.add("shown");
    held.loading = false;
    held.seq = held.looked ? seq : null; // heat maps are kept from the first look on: look again
    held.looked = true;
  };
  image.onerror = () => { held.loading = false; };
  image.src = `/api/picture/${encodeURIComponent(name)}?width=800&heat=${held.heat ? 1 : 0}&seq=${seq}&t=${Date.now()}`;
}

function showCamera(name, camera) {
  if (!cameras.has(name)) cameras.set(name, card(name));
  const held = cameras.get(name), { find } = held, verdict = camera.verdict;
  const source = camera.source, down = ["down", "failed"].includes(source.state);
  // A camera that is down shows no verdict: the last one says nothing about the part that is there now.
  const label = down ? "DOWN" : verdict ? verdict.label : "–";
  find(".verdict").className = `verdict ${down ? "unknown" : verdict ? label.toLowerCase() : ""}`;
  set(find(".label"), label);
  const product = verdict?.product ?? camera.product;
  set(find(".part"), [product, verdict?.part_id ? `part ${verdict.part_id}` : ""].filter(Boolean).join(" · "));
  set(find(".age"), verdict ? (down ? `${verdict.label} ` : "") + age(verdict.ts) : "no verdict yet");
  set(find(".value"), short(verdict?.score ?? null));
  // Without a picture there was nothing to hold against one: that says nothing about the calibration.
  const none = verdict?.reason === "no_threshold" ? "no threshold" : "";
  set(find(".against"), verdict?.threshold != null ? `threshold ${short(verdict.threshold)}` : none);
  set(find(".reason"), label === "UNKNOWN" ? verdict.reason.replaceAll("_", " ") : "");
  find(".reason").title = verdict?.detail ?? "";
  pairs(find(".counts"), ["OK", "NG", "UNKNOWN"].map((each) => [each, count(camera.labels[each] ?? 0)]));
  find(".source").className = `source ${down ? "down" : ""}`;
  set(find(".source"), [`camera ${source.state}`, source.restarts ? `${source.restarts} restarts` : "", source.detail.split("\n")[0]].filter(Boolean).join(" · "));
  showAlarms(name, find(".alarms"), camera.alarms);
  draw(find("svg"), camera.history.slice(-CHART), Math.max(30, Math.min(CHART, camera.history.length)));
  if (verdict) picture(name, held, verdict.seq);
  const older = camera.picture && !camera.picture.current; // the last verdict rests on no picture
  find(".picture").classList.toggle("older", Boolean(older));
  set(find(".whose"), older ? `earlier picture${camera.picture.part_id ? `, part ${camera.picture.part_id}` : ""}` : "");
}

function age(moment) {
  const seconds = (Date.now() + skew - Date.parse(moment)) / 1000;
  return seconds < 2 ? "now" : `${duration(seconds)} ago`;
}

function showAlarms(camera, list, alarms) {
  const key = JSON.stringify(alarms);
  if (list.dataset.key === key) return; // keep the button under the finger
  list.dataset.key = key;
  list.replaceChildren(...alarms.map((alarm) => {
    const item = make("li", undefined, alarm.state), what = make("span", undefined, "what");
    what.append(make("span", alarm.state, "tag"), ` ${alarm.kind.replace("_", " ")}`, make("small", alarm.detail));
    item.append(what);
    if (alarm.state !== "acknowledged") {
      const button = make("button", "Acknowledge");
      button.type = "button";
      button.addEventListener("click", () => acknowledge(button, camera, alarm.kind));
      item.append(button);
    }
    return item;
  }));
}

async function acknowledge(button, camera, kind) {
  button.disabled = true;
  try {
    const headers = { "Content-Type": "application/json", "X-Andon": "1" };
    const answer = await fetch("/api/acknowledge", { method: "POST", headers, body: JSON.stringify({ camera, kind }) });
    if (!answer.ok) throw new Error((await answer.json()).error);
    await refresh();
  } catch (error) {
    button.disabled = false;
    button.textContent = `Failed: ${error.message}. Again?`;
  }
}

// Which products have one; an override of another model is ignored, and nobody should believe it is there.
function byCommand(overrides) {
  const all = Object.entries(overrides?.thresholds ?? {});
  for (const [camera, own] of Object.entries(overrides?.camera_thresholds ?? {})) {
    all.push(...Object.entries(own).map(([product, each]) => [`${product} at ${camera}`, each]));
  }
  return all.map(([product, each]) => product + (each.in_force ? "" : " (ignored: another model's)")).join(", ");
}

// A plain number is in force under whatever model runs; one that names another model, or that a command stands before, is not.
function byConfiguration(configured) {
  const all = Object.entries(configured?.thresholds ?? {});
  return all.map(([product, each]) => product + (!each.in_force ? " (not in force)" : each.model ? "" : " (whatever model runs)")).join(", ");
}

function showLine(state) {
  const line = state.line;
  set($("station"), `${line.site} / ${line.line} / ${line.station}`);
  document.title = `Andon · ${line.station}`;
  const facts = [["method", state.method], ["bundle", state.bundle], ["engines", state.backend && `${state.backend} ${state.variant}`],
    ["thresholds by command", byCommand(state.overrides)], ["thresholds by configuration", byConfiguration(state.configured)], ["frames", count(state.frames)], ["rate", `${state.fps.toFixed(1)}/s`], ["up", duration(state.uptime_s)]];
  $("facts").replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => {
    const fact = make("span", `${name} `);
    fact.append(make("b", value));
    return fact;
  }));
  const all = Object.values(state.cameras), alarms = all.flatMap((camera) => camera.alarms);
  const bad = alarms.some((alarm) => alarm.state !== "acknowledged");
  const sound = state.health.every((check) => check.ok);
  $("lamp").className = `lamp ${bad ? "ng" : sound && !alarms.length ? "ok" : "unknown"}`;
  $("health").replaceChildren(...state.health.map((check) => {
    const item = make("li", undefined, check.ok ? "" : "bad");
    item.append(make("span", check.ok ? "✓" : "✗", "mark"), make("span", check.name), make("span", check.detail, "detail"));
    return item;
  }));
}

function showDelivery(delivery) {
  if (!delivery) return;
  const outbox = delivery.outbox;
  pairs($("delivery"), [
    ["broker", delivery.broker ?? "none"],
    ["connection", delivery.broker ? (delivery.connected ? "up" : delivery.reason) : "–", delivery.broker && !delivery.connected],
    ["acknowledged", count(delivery.acknowledged)],
    ["waiting in outbox", count(outbox.messages), outbox.messages > 1000],
    ["oldest waits", outbox.messages ? duration(outbox.oldest_age_s) : "–"],
    ["dropped", count(outbox.dropped), outbox.dropped > 0],
    ...(outbox.degraded ? [["disk", outbox.degraded, true]] : []),
  ]);
}

function showLatency(latency) {
  const rows = Object.entries(latency).filter(([, times]) => times.p50 !== undefined);
  const most = Math.max(...rows.map(([, times]) => times.p50), 1e-9);
  $("latency").tBodies[0].replaceChildren(...rows.map(([stage, times]) => {
    const row = make("tr", undefined, stage === "total" ? "total" : ""), bar = make("td", undefined, "bar"), fill = make("i");
    fill.style.width = `${(100 * times.p50) / most}%`;
    bar.append(fill);
    row.append(make("td", stage), bar, make("td", times.p50.toFixed(1), "number"), make("td", times.p95.toFixed(1), "number"));
    return row;
  }));
}

function showMemory(memory) {
  if (!memory) {
    pairs($("memory"), [["online memory", "off"]]);
    return;
  }
  pairs($("memory"), [
    ["version", memory.version == null ? "none" : String(memory.version)],
    ["frozen", memory.frozen ? "yes" : "no"],
    ...(memory.order ? [["order", memory.order === "update_first" ? "update, then score" : "score, then update"]] : []),
    ...Object.entries(memory.rows).map(([product, rows]) => [`rows ${product === "*" ? "" : product}`, count(rows)]),
    ["drift", memory.drift.length ? memory.drift.join(", ") : "none", memory.drift.length > 0],
    ...Object.entries(memory.drift_score ?? {}).map(([name, value]) => [name, value.toFixed(3)]),
  ]);
}

async function refresh() {
  const answer = await fetch("/api/state", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (answer.status === 401) location.reload();
  if (!answer.ok) throw new Error(answer.statusText);
  const state = await answer.json();
  const theirs = Date.parse(answer.headers.get("Date"));
  // The header has whole seconds. Also back to none: the station's clock, or this one, may have been set right since.
  if (Number.isFinite(theirs)) skew = Math.abs(theirs - Date.now()) > 2000 ? theirs - Date.now() : 0;
  lastContact = Date.now();
  $("lost").hidden = true;
  showLine(state);
  for (const [name, camera] of Object.entries(state.cameras)) showCamera(name, camera);
  showDelivery(state.delivery);
  showLatency(state.latency_ms);
  showMemory(state.memory);
}

async function run() {
  try {
    await refresh();
  } catch (error) {
    $("lamp").className = "lamp ng";
    $("lost").hidden = false;
    set($("lost"), `No contact with the station for ${duration((Date.now() - lastContact) / 1000)}. What is shown is old.`);
    console.warn(error);
  }
  setTimeout(run, PERIOD);
}
run();
