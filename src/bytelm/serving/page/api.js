// Requests to the server, and its errors as exceptions whose message can be shown.

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let key = "";

export function setKey(value) {
  key = value;
}

async function request(path, body, signal) {
  const headers = {};
  // Headers are Latin-1, and keys are UTF-8.
  if (key) headers.Authorization = "Bearer " + String.fromCharCode(...new TextEncoder().encode(key));
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached: check that it is running, then retry.");
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* A proxy's answer, which is not in the API's shape. */ }
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` (retry after ${wait} s)`;
  throw new ApiError(message, response.status);
}

export async function model(signal) {
  return (await (await request("v1/models", null, signal)).json()).data[0];
}

export async function patches(body, signal) {
  return (await request("v1/patches", body, signal)).json();
}

// Yield the choices of a completion as they arrive.
export async function* complete(body, signal) {
  const response = await request("v1/completions", { ...body, stream: true, trace: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const lost = new ApiError("The connection to the server was lost before the end.");
  let buffer = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw signal.aborted ? error : lost;
    }
    if (part.done) throw lost;
    buffer += part.value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message);
      if (chunk.choices.length) yield chunk.choices[0];
    }
  }
}
