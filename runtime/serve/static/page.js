// The page: a picture goes in, its progress is shown, and the result is compared and downloaded.

import * as api from "./api.js";
import { Compare } from "./compare.js";

const $ = (id) => document.getElementById(id);
const stages = {
  sending: "Sending the picture", queued: "Waiting for its turn", waiting: "Waiting for memory", preparing: "Preparing",
  running: "Starting", encoding: "Encoding", sampling: "Sampling", decoding: "Decoding", finishing: "Finishing",
  lost: "The connection is lost; trying again", fetching: "Fetching the result",
};
const compare = new Compare({
  box: $("compare"), picture: $("picture"), before: $("before"), after: $("after"), handle: $("handle"),
  changed: (percent) => { $("zoom-value").textContent = `${percent} %`; },
});
let file = null, engines = [], job = null, working = null;
const DRAFT_MS = 1000; // between two previews
const urls = {}; // object URLs by the image that shows them

function show(part) {
  for (const id of ["progress", "result"]) $(id).hidden = id !== part;
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
  if (text) $("error").scrollIntoView({ block: "nearest" });
}

// Show data in an image; false if this browser cannot display it.
async function display(id, blob) {
  if (urls[id]) URL.revokeObjectURL(urls[id]);
  $(id).src = urls[id] = URL.createObjectURL(blob);
  return $(id).decode().then(() => true, () => false);
}

async function take(chosen) {
  if (!chosen) return;
  if (chosen.type && !chosen.type.startsWith("image/")) {
    complain(`${chosen.name || "This"} is not a picture. Choose a file such as a PNG, a JPEG or a WebP.`);
    return;
  }
  file = chosen;
  complain("");
  $("drop-title").textContent = chosen.name || "Pasted picture";
  const size = bytes(chosen.size), hint = "Choose another to replace it.";
  $("drop-text").textContent = `${size}. ${hint}`;
  $("preview").hidden = true;
  setStart();
  const shown = await display("preview", chosen);
  if (file !== chosen) return; // another was chosen meanwhile
  $("preview").hidden = !shown;
  const [width, height] = [$("preview").naturalWidth, $("preview").naturalHeight];
  if (shown) $("drop-text").textContent = `${width} × ${height} pixels, ${size}. ${hint}`;
  setStart();
}

function setStart() {
  $("start").disabled = !file || !engines.length || Boolean(working);
  const scale = engines.find((one) => one.name === $("engine").value)?.scale;
  const [width, height] = [$("preview").naturalWidth * scale, $("preview").naturalHeight * scale];
  $("start").textContent = width && !$("preview").hidden ? `Enlarge to ${width} × ${height}` : "Enlarge";
}

function setDefaults() {
  const engine = engines.find((one) => one.name === $("engine").value);
  if (!engine) return;
  $("steps").value = engine.steps;
  $("steps").max = engine.most_steps;
  $("fidelity").value = engine.fidelity;
  $("fidelity-value").textContent = engine.fidelity.toFixed(2);
  $("fidelity-row").hidden = !engine.takes_fidelity;
  setStart();
}

async function loadEngines() {
  try {
    engines = await api.engines();
  } catch (error) {
    const asked = error.status === 401;
    const wrong = asked && $("token").value ? "This token is not the right one. " : "";
    $("token-row").hidden = !asked;
    complain(asked ? `${wrong}This server asks for a token. Type it into the field Token.` : error.message);
    if (asked) $("token").focus();
    return;
  }
  complain("");
  $("engine").replaceChildren(...engines.map((one) => new Option(`${one.name} (×${one.scale})`, one.name)));
  setDefaults();
}

function report(state) {
  if (state.fraction !== undefined) $("bar").value = state.fraction;
  const position = state.status === "queued" && state.position > 1 ? `, number ${state.position} in the queue` : "";
  $("stage").textContent = (stages[state.stage] ?? "") + position;
  const left = Math.ceil(state.seconds_left ?? 0);
  $("left").textContent = left && state.status === "running" ? `about ${duration(left)} left` : "";
}

function duration(seconds) {
  if (seconds < 90) return `${seconds} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

const bytes = (size) => (size < 1e5 ? `${Math.ceil(size / 1e3)} kB` : `${(size / 1e6).toFixed(size < 1e7 ? 1 : 0)} MB`);

// Show previews of a job until `signal` ends it. A page that nobody sees asks for none.
async function showDrafts(id, signal) {
  while (!signal.aborted) {
    const drawn = document.hidden ? null : await api.preview(id, signal).catch(() => null);
    if (drawn && !signal.aborted && await display("draft", drawn)) $("draft").hidden = false;
    await new Promise((resolve) => setTimeout(resolve, DRAFT_MS));
  }
}

async function start(event) {
  event.preventDefault();
  if (working || !file) return;
  complain("");
  const options = Object.fromEntries(["engine", "steps", "fidelity", "format", "seed"].map((id) => [id, $(id).value]));
  const began = performance.now(), sent = file, mine = new AbortController(), drafts = new AbortController();
  working = mine;
  $("draft").hidden = true;
  job = null;
  setStart();
  show("progress");
  report({ stage: "sending", fraction: 0 });
  $("cancel").focus({ preventScroll: true });
  $("progress").scrollIntoView({ block: "nearest" });
  try {
    job = await api.submit(sent, options, mine.signal);
    showDrafts(job.id, drafts.signal);
    const state = await api.follow(job.id, report, mine.signal);
    if (state.status === "failed") throw new api.ServiceError(state.problem.status, api.sentence(state.problem.detail));
    if (state.status !== "done") throw new api.ServiceError(0, "The picture was cancelled on the server.");
    report({ stage: "fetching", fraction: 1 });
    const result = await api.result(job.id, mine.signal);
    await present(sent, result, state, (performance.now() - began) / 1000);
  } catch (error) {
    show(null);
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    drafts.abort();
    working = null;
    setStart();
    if ($("result").hidden) $("start").focus({ preventScroll: true });
  }
}

async function present(sent, blob, state, seconds) {
  const name = (sent.name || "picture").replace(/\.[^.]*$/, "");
  const scale = engines.find((one) => one.name === state.options.engine)?.scale ?? 1;
  const [seen, original] = await Promise.all([display("after", blob), display("before", sent)]);
  $("download").href = urls.after;
  $("download").download = `${name}_x${scale}${state.suffix}`;
  const [width, height] = seen ? [$("after").naturalWidth, $("after").naturalHeight] : [state.width * scale, state.height * scale];
  $("facts").textContent = `${width} × ${height} pixels, ${bytes(blob.size)}, done in ${duration(Math.ceil(seconds))}.`;
  show("result");
  document.querySelector(".frame").hidden = $("zooms").hidden = !seen;
  for (const one of [$("before"), $("handle"), ...document.querySelectorAll(".tag")]) one.hidden = !original;
  $("unseen").hidden = seen && original;
  $("unseen").textContent = seen
    ? "This browser cannot show the picture as it was sent, so only the result is shown."
    : "This browser cannot show pictures of this format. Download the result, or enlarge again as PNG.";
  if (seen) compare.fit();
  compare.move(50);
  (seen && original ? $("handle") : $("download")).focus({ preventScroll: true });
  $("result").scrollIntoView({ block: "nearest" });
}

async function cancel() {
  working?.abort();
  show(null);
  if (job) await api.remove(job.id).catch(() => {});
  job = null;
}

function again() {
  show(null);
  $("file").value = "";
  $("file").focus();
  $("file").click();
}

addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
addEventListener("dragleave", (event) => event.relatedTarget || $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
$("file").addEventListener("change", (event) => take(event.target.files[0]));
$("engine").addEventListener("change", setDefaults);
$("fidelity").addEventListener("input", () => { $("fidelity-value").textContent = Number($("fidelity").value).toFixed(2); });
$("options").addEventListener("submit", start);
$("token").addEventListener("change", () => { api.setToken($("token").value); loadEngines(); });
$("cancel").addEventListener("click", cancel);
$("zoom-in").addEventListener("click", () => compare.scale(compare.zoom * 1.5));
$("zoom-out").addEventListener("click", () => compare.scale(compare.zoom / 1.5));
$("zoom-fit").addEventListener("click", () => compare.fit());
$("again").addEventListener("click", again);
addEventListener("resize", () => $("result").hidden || compare.zoom > compare.least || compare.fit());
loadEngines();
