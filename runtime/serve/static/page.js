// The page: a picture goes in, its progress is shown, and the result is compared and downloaded.

import * as api from "./api.js";
import { Compare } from "./compare.js";

const $ = (id) => document.getElementById(id);
const stages = {
  queued: "Waiting for its turn", waiting: "Waiting for memory", preparing: "Preparing", encoding: "Encoding",
  sampling: "Sampling", decoding: "Decoding", finishing: "Finishing",
};
const compare = new Compare($("compare"), $("zoomed"), $("before"), $("handle"), $("zoom-value"));
let file = null, engines = [], job = null, following = null, urls = [];

function show(part) {
  for (const id of ["progress", "result"]) $(id).hidden = id !== part;
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function take(chosen) {
  if (!chosen) return;
  if (chosen.type && !chosen.type.startsWith("image/")) {
    complain(`${chosen.name || "This"} is not a picture. Choose a file such as a PNG, a JPEG or a WebP.`);
    return;
  }
  file = chosen;
  complain("");
  $("drop-title").textContent = chosen.name || "Pasted picture";
  $("drop-text").textContent = `${(chosen.size / 1e6).toFixed(2)} MB. Choose, drop or paste another to replace it.`;
  $("start").disabled = !engines.length;
}

function setDefaults() {
  const engine = engines.find((one) => one.name === $("engine").value);
  if (!engine) return;
  $("steps").value = engine.steps;
  $("steps").max = engine.most_steps;
  $("fidelity").value = engine.fidelity;
  $("fidelity-value").textContent = engine.fidelity.toFixed(2);
}

async function loadEngines() {
  try {
    engines = await api.engines();
  } catch (error) {
    $("token-row").hidden = error.status !== 401;
    complain(error.status === 401 ? "This server asks for a token. Type it into the field Token." : error.message);
    return;
  }
  complain("");
  $("engine").replaceChildren(...engines.map((one) => new Option(`${one.name} (x${one.scale})`, one.name)));
  $("start").disabled = !file;
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
  return seconds < 90 ? `${seconds} s` : `${Math.round(seconds / 60)} min`;
}

async function start(event) {
  event.preventDefault();
  complain("");
  const options = Object.fromEntries(["engine", "steps", "fidelity", "format", "seed"].map((id) => [id, $(id).value]));
  const began = performance.now();
  $("start").disabled = true;
  show("progress");
  report({ stage: "queued", fraction: 0, status: "queued", position: 0 });
  try {
    job = await api.submit(file, options);
    following = new AbortController();
    const state = await api.follow(job.id, report, following.signal);
    if (state.status === "failed") throw new api.ServiceError(state.problem.status, state.problem.detail);
    if (state.status !== "done") return show(null);
    await present(await api.result(job.id), state, (performance.now() - began) / 1000);
  } catch (error) {
    show(null);
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    $("start").disabled = !file;
    following = null;
  }
}

async function present(blob, state, seconds) {
  urls.forEach(URL.revokeObjectURL);
  urls = [URL.createObjectURL(file), URL.createObjectURL(blob)];
  [$("before").src, $("after").src] = urls;
  const name = (file.name || "picture").replace(/\.[^.]*$/, "");
  const scale = engines.find((one) => one.name === state.options.engine)?.scale ?? 1;
  $("download").href = urls[1];
  $("download").download = `${name}_x${scale}${state.suffix}`;
  const size = `${state.width * scale} x ${state.height * scale} pixels`;
  $("facts").textContent = `${size}, ${(blob.size / 1e6).toFixed(2)} MB, in ${duration(Math.ceil(seconds))}.`;
  show("result");
  await Promise.allSettled([$("before").decode(), $("after").decode()]);
  compare.scale(1);
  compare.move(50);
  $("handle").focus({ preventScroll: true });
  $("result").scrollIntoView({ block: "nearest" });
}

async function cancel() {
  following?.abort();
  show(null);
  if (job) await api.remove(job.id).catch(() => {});
  job = null;
}

$("file").addEventListener("change", (event) => take(event.target.files[0]));
$("drop").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
$("engine").addEventListener("change", setDefaults);
$("fidelity").addEventListener("input", () => { $("fidelity-value").textContent = Number($("fidelity").value).toFixed(2); });
$("options").addEventListener("submit", start);
$("token").addEventListener("change", () => { api.setToken($("token").value); loadEngines(); });
$("cancel").addEventListener("click", cancel);
$("zoom-in").addEventListener("click", () => compare.scale(compare.zoom * 1.5));
$("zoom-out").addEventListener("click", () => compare.scale(compare.zoom / 1.5));
$("again").addEventListener("click", () => { show(null); $("file").value = ""; $("file").click(); });
addEventListener("resize", () => compare.move(compare.border));
loadEngines();
