"use strict";
// A prompt → POST /v1/completions with stream → text as it comes.
const $ = (id) => document.getElementById(id);
let running = null;

fetch("v1/models").then((r) => r.json()).then((m) => { $("model").textContent = m.data[0].id; document.title = m.data[0].id; });

function asked() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  const body = { prompt: $("prompt").value, stream: true };
  for (const id of ["max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed"])
    if (number(id) !== null) body[id] = number(id);
  if ($("stop").value) body.stop = [$("stop").value];
  return body;
}

function problem(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
}

// The events of a response body, each as its data line.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}

async function write(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  problem("");
  $("go").disabled = true;
  $("halt").disabled = false;
  $("given").textContent = $("prompt").value;
  $("written").textContent = "";
  $("status").textContent = "waiting …";
  const start = performance.now();
  let pieces = 0;
  try {
    const response = await fetch("v1/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked()), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const said = JSON.parse(data);
      if (said.error) throw new Error(said.error.message);
      $("written").append(said.choices[0].text);
      pieces += 1;
      $("status").textContent = `${(pieces / (performance.now() - start) * 1000).toFixed(1)} tokens/s`;
    }
  } catch (error) {
    if (error.name !== "AbortError") problem(error.message);
    if (!pieces) $("status").textContent = "";
  } finally {
    running = null;
    $("go").disabled = false;
    $("halt").disabled = true;
  }
}

$("form").addEventListener("submit", write);
$("halt").addEventListener("click", () => running && running.abort());
$("prompt").addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) $("form").requestSubmit(); });
