// The service's interface: jobs are sent, followed and fetched. Errors carry text for people.

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
  if (token) headers.Authorization = `Bearer ${token}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The server does not answer. Check that it is still running, then try again.");
  }
  if (answer.ok) return answer;
  let detail = `The server answered with status ${answer.status}.`;
  try {
    detail = (await answer.json()).detail ?? detail;
  } catch { /* not a problem description */ }
  throw new ServiceError(answer.status, detail);
}

export const engines = async () => (await call("/v1/engines")).json();

export async function submit(file, options) {
  const query = new URLSearchParams(Object.entries(options).filter(([, value]) => value !== ""));
  const answer = await call(`/v1/jobs?${query}`, { method: "POST", body: file });
  return answer.json();
}

export const result = async (id) => (await call(`/v1/jobs/${id}/result`)).blob();
export const remove = (id) => call(`/v1/jobs/${id}`, { method: "DELETE" });

// Call `report` with every state of a job until it ends; returns the last state.
export async function follow(id, report, signal) {
  const answer = await call(`/v1/jobs/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", state = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return state ?? (await (await call(`/v1/jobs/${id}`)).json());
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
