// The service's interface: jobs are sent, followed and fetched. Errors carry text for people.

const PATIENCE_S = 300; // a server that is being restarted may be away for so long

let token = sessionStorage.getItem("moesr-token") ?? "";

export function setToken(text) {
  token = text.trim();
  sessionStorage.setItem("moesr-token", token);
}

export class ServiceError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  let answer;
  try {
    if (token) headers.Authorization = `Bearer ${token}`;
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The server does not answer. Check that it is still running, then try again.");
  }
  if (answer.ok) return answer;
  let detail = `the server answered with status ${answer.status}`;
  try {
    detail = (await answer.json()).detail ?? detail;
  } catch { /* not a problem description */ }
  throw new ServiceError(answer.status, sentence(detail));
}

// A problem's text as a sentence.
export function sentence(text) {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

export const engines = async () => (await call("/v1/engines")).json();

export async function submit(file, options, signal) {
  const query = new URLSearchParams(Object.entries(options).filter(([, value]) => value !== ""));
  return (await call(`/v1/jobs?${query}`, { method: "POST", body: file, signal })).json();
}

export const result = async (id, signal) => (await call(`/v1/jobs/${id}/result`, { signal })).blob();
// The picture as far as it has been sampled; null if there is no preview yet.
export async function preview(id, signal) {
  const answer = await call(`/v1/jobs/${id}/preview`, { signal });
  return answer.status === 204 ? null : answer.blob();
}

export const remove = (id) => call(`/v1/jobs/${id}`, { method: "DELETE" });

// Call `report` with every state of a job until it ends; returns the last state. A connection that breaks is
// made again.
export async function follow(id, report, signal) {
  let lost = null;
  for (;;) {
    try {
      const state = await listen(id, (state) => { lost = null; report(state); }, signal);
      if (state && !["queued", "running"].includes(state.status)) return state;
    } catch (error) {
      if (error.name === "AbortError" || error.status > 0) throw error;
    }
    lost ??= performance.now();
    if (performance.now() - lost > PATIENCE_S * 1000) throw new ServiceError(0, "The connection to the server is lost.");
    report({ stage: "lost", status: "lost" });
    await new Promise((resolve) => setTimeout(resolve, 1000));
    if (signal.aborted) throw new DOMException("", "AbortError");
  }
}

// Read the events of a job until the stream ends; returns the last state.
async function listen(id, report, signal) {
  const answer = await call(`/v1/jobs/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", state = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return state;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("");
      if (!data.trim()) continue;
      state = JSON.parse(data);
      report(state);
    }
  }
}
