// The live view. Reports come as events twice a second; nothing is kept but the last two minutes.
"use strict";

const KEPT = 240;
const SVG = "http://www.w3.org/2000/svg";
const history = [];
let chosen = null;
let layers = 0;

const $ = (id) => document.getElementById(id);

function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").classList.toggle("error", isError);
}

function bytes(count) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (count < 1024) return unit === "B" ? `${count} B` : `${count.toFixed(1)} ${unit}`;
    count /= 1024;
  }
  return `${count.toFixed(1)} TiB`;
}

// ---- requests ------------------------------------------------------------------------------------

async function call(method, path, body) {
  const options = { method, headers: headers() };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ? found.error.message : `status ${answer.status}`);
  return found;
}

async function attempt(what, done) {
  try {
    const found = await what();
    if (done) say(typeof done === "function" ? done(found) : done);
    return found;
  } catch (error) {
    say(error.message, true);
    return null;
  }
}

const path = (name, deed = "") => `/v1/sessions/${encodeURIComponent(name)}${deed}`;

// An answer, piece by piece, into the page.
async function stream(url, body) {
  const answer = await fetch(url, {
    method: "POST",
    headers: { ...headers(), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
  });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  let finish = "";
  for await (const event of events(answer)) {
    if (event === "[DONE]") break;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) {
      $("answer").textContent += choice.text ?? choice.delta?.content ?? "";
      finish = choice.finish_reason ?? finish;
    }
  }
  return finish;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

// ---- drawing -------------------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawMemory(report) {
  const pool = report.pool;
  const tiers = [
    ["device", "Device", "device_bytes", pool.arena_bytes],
    ["host", "Host memory", "host_bytes", pool.host_budget_bytes],
    ["disk", "Disk", "disk_bytes", pool.spill_limit_bytes],
  ];
  $("memory").replaceChildren(...tiers.map(([kind, title, field, cap]) => {
    const inTier = report.sessions.filter((session) => session[field] > 0);
    const used = inTier.reduce((sum, session) => sum + session[field], 0);
    const whole = Math.max(cap || 0, used, 1);
    const bar = element("div", { className: `bar ${kind}` });
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", `${title}: ${inTier.length} sessions, ${bytes(used)}`);
    for (const session of inTier) {
      const block = element("i", { title: `${session.id ?? "another session"}: ${bytes(session[field])}` });
      block.style.width = `${(100 * session[field]) / whole}%`;
      block.classList.toggle("other", session.id == null);
      block.classList.toggle("chosen", session.id != null && session.id === chosen);
      bar.append(block);
    }
    const amount = cap ? `${bytes(used)} of ${bytes(cap)}` : bytes(used);
    return element("div", { className: "tier" }, element("span", { textContent: title }), bar,
      element("span", { className: "amount", textContent: amount }));
  }));
}

function chart(id, lines) {
  const svg = $(id);
  const top = Math.max(...lines.flatMap(([, values]) => values), 1e-9) * 1.08;
  svg.setAttribute("viewBox", `0 0 ${KEPT} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren(...lines.map(([kind, values]) => {
    const line = document.createElementNS(SVG, "polyline");
    const at = (value, index) => `${KEPT - values.length + index},${100 - (100 * value) / top}`;
    line.setAttribute("points", values.map(at).join(" "));
    line.setAttribute("class", `line-${kind}`);
    return line;
  }));
}

function drawTime(report) {
  const device = report.sessions.reduce((sum, session) => sum + (session.device_bytes || 0), 0);
  const { offloaded_bytes: out, onboarded_bytes: back } = report.pool.pool;
  history.push({ at: performance.now() / 1e3, device, cap: report.pool.arena_bytes, out, back, tokens: report.tokens });
  if (history.length > KEPT + 1) history.shift();
  const rates = (field) => history.slice(1).map((now, index) => {
    const before = history[index];
    return Math.max(0, now[field] - before[field]) / Math.max(now.at - before.at, 1e-3);
  });
  chart("chart-device", [["cap", history.map((one) => one.cap)], ["device", history.map((one) => one.device)]]);
  const [outs, backs, tokens] = ["out", "back", "tokens"].map(rates);
  chart("chart-link", [["out", outs], ["back", backs]]);
  chart("chart-tokens", [["tokens", tokens]]);
  const last = (values) => values[values.length - 1] || 0;
  $("now-device").textContent = bytes(device);
  $("now-link").textContent = `${bytes(last(outs))}/s, ${bytes(last(backs))}/s`;
  $("now-tokens").textContent = last(tokens).toFixed(1);
}

// Rows stay the same elements, so that what has the keyboard keeps it.
function drawSessions(sessions) {
  const body = $("sessions");
  const rows = new Map([...body.rows].map((row) => [row.dataset.name, row]));
  for (const session of sessions) {
    const row = rows.get(session.id) || newRow(session.id);
    rows.delete(session.id);
    if (!row.parentNode) body.append(row);
    const [state, tokens, where, steered] = [...row.cells].slice(1, 5);
    const layer = session.layer == null ? "" : ` after layer ${session.layer}`;
    const next = session.pause_at == null ? "" : `, stops after ${session.pause_at}`;
    state.textContent = session.state + layer + next + (session.rolled_back ? " (rolled back)" : "");
    state.className = `state-${session.state}`;
    tokens.textContent = session.tokens ?? "";
    const places = [["device", session.device_bytes], ["host", session.host_bytes], ["disk", session.disk_bytes]];
    where.textContent = places.filter(([, size]) => size > 0).map(([name]) => name).join(", ");
    drawSteering(steered, session);
    const held = { pause: "paused lost", resume: "idle queued running waiting lost" };
    for (const [name, states] of Object.entries(held)) {
      row.querySelector(`.${name}`).disabled = states.split(" ").includes(session.state);
    }
  }
  for (const row of rows.values()) row.remove();
  $("none").hidden = sessions.length > 0;
  if (chosen != null && !sessions.some((session) => session.id === chosen)) choose(null);
}

function newRow(name) {
  const open = element("button", { textContent: name, onclick: () => choose(name) });
  const layer = element("input", { type: "number", min: 0, max: Math.max(layers - 1, 0), value: layers >> 1 });
  layer.setAttribute("aria-label", `Layer at which ${name} pauses`);
  const button = (kind, text, deed) => element("button", {
    className: kind, textContent: text, type: "button", ariaLabel: `${text} ${name}`, onclick: deed,
  });
  const pause = () => attempt(() => call("POST", path(name, "/pause"), { layer: Number(layer.value) }),
    `${name} stops after layer ${layer.value} of its next forward`);
  const controls = element("td", { className: "controls" },
    element("label", {}, "at layer ", layer),
    button("pause", "Pause", pause),
    button("resume", "Resume", () => resume(name)),
    button("fork", "Fork", () => attempt(() => call("POST", path(name, "/fork"), {}), (made) => `${made.id} is a fork`)),
    button("delete", "Delete", () => attempt(() => call("DELETE", path(name)), `${name} is gone`)));
  const head = element("th", { scope: "row" }, open);
  const row = element("tr", {}, head, ...[0, 1, 2, 3].map(() => element("td")), controls);
  row.dataset.name = name;
  return row;
}

function drawSteering(cell, session) {
  const steering = session.steering || [];
  const known = [...cell.children].map((one) => one.dataset.name).join();
  if (known === steering.map((one) => one.name).join()) return;
  cell.replaceChildren(...steering.map((one) => {
    const strength = element("input", { type: "number", step: "any", value: one.strength });
    strength.setAttribute("aria-label", `Strength of ${one.name} for ${session.id}`);
    strength.onchange = () => attempt(
      () => call("POST", path(session.id, "/steer"), { layer: one.layer, name: one.name, strength: Number(strength.value) }),
      `${one.name} at ${strength.value}`);
    const label = element("label", {}, `${one.name} at ${one.layer} `, strength);
    label.dataset.name = one.name;
    return label;
  }));
}

function draw(report) {
  const model = report.model;
  layers = model.layers;
  $("model").textContent = `${model.id} on ${model.device}, ${model.layers} layers, room on the device for ${model.slabs} sessions`;
  $("steer-layer").max = layers - 1;
  drawMemory(report);
  drawTime(report);
  drawSessions(report.sessions.filter((session) => session.id != null));
}

// ---- one session ---------------------------------------------------------------------------------

function choose(name) {
  if (chosen !== name) $("answer").textContent = "";
  chosen = name;
  $("one").hidden = name == null;
  $("one-title").textContent = `Session ${name}`;
  if (name != null) $("prompt").focus();
}

async function resume(name) {
  choose(name);
  const finish = await attempt(() => stream(path(name, "/resume"), {}));
  if (finish) say(`${name}: ${finish}`);
}

$("say").onsubmit = async (event) => {
  event.preventDefault();
  const name = chosen;
  $("answer").textContent = "";
  const body = { prompt: $("prompt").value, max_tokens: Number($("count").value), session_id: name, temperature: 0 };
  const finish = await attempt(() => stream("/v1/completions", body));
  if (finish) say(`${name}: ${finish}`);
};

$("steer").onsubmit = (event) => {
  event.preventDefault();
  const value = (id) => $(id).value;
  const body = {
    layer: Number(value("steer-layer")), strength: Number(value("steer-strength")),
    toward: value("toward"), away: value("away"),
  };
  attempt(() => call("POST", path(chosen, "/steer"), body), `${chosen} is steered`);
};

$("create").onsubmit = async (event) => {
  event.preventDefault();
  const name = $("name").value;
  const made = await attempt(() => call("POST", "/v1/sessions", name ? { id: name } : {}), (one) => `${one.id} is there`);
  if (made) {
    $("name").value = "";
    choose(made.id);
  }
};

$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  watch();
};

async function watch() {
  for (;;) {
    try {
      const answer = await fetch("/v1/events", { headers: headers() });
      $("key-form").hidden = answer.status !== 401;
      if (answer.status === 401) {
        $("model").textContent = "this server needs an API key";
        return;
      }
      for await (const event of events(answer)) draw(JSON.parse(event));
    } catch (error) {
      console.warn(error);
    }
    $("model").textContent = "connection lost; trying again";
    await new Promise((wake) => setTimeout(wake, 1000));
  }
}

watch();
