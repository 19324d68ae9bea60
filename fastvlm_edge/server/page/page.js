// The page of `fastvlm-edge serve`: a picture, questions about it, and answers as they are written. Nothing is loaded from elsewhere.

const $ = (id) => document.getElementById(id);
const video = $("video");
const KEPT_ANSWERS = 50; // of a continuous run
const PAUSE_AFTER_A_FAULT = 5; // seconds, in a continuous run
const SHORTEST = 50; // milliseconds of decoding that are enough for a figure
const SENT_AS_IT_IS = ["image/jpeg", "image/png", "image/webp"];
const JPEG_QUALITY = 0.92;

const KEY = "fastvlm-edge key";
const THEME = "fastvlm-edge theme";

let imageSize = 1024; // pixels of a side of the model's picture, until the server has said it
let covers = false; // the model sees the middle of a picture: its short side counts
let camera = null; // MediaStream
let picture = null; // data: URL that is asked about, or null while the camera shows live pictures
let conversation = null; // {picture, turns: [{question, answer}], card}
let running = null; // AbortController of the answer that is being written

// The server ------------------------------------------------------------------------------------------------------------

class ServerError extends Error {
  constructor(status, message, again) {
    super(message);
    this.status = status;
    this.again = again; // seconds after which it may be asked again, for a server that is busy or loading
  }
}

async function call(path, { body, signal } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = kept(() => sessionStorage.getItem(KEY));
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    watchHealth();
    throw new ServerError(0, "The server does not answer. Check that it is running.");
  }
  if (response.ok) return response;
  const said = (await response.json().catch(() => null))?.error?.message;
  if (response.status === 401) askForKey();
  throw new ServerError(response.status, inWords(response.status, said), Math.max(1, Number(response.headers.get("Retry-After")) || 1));
}

function inWords(status, said) {
  if (status === 401) return "This server asks for an API key. Type it at the top of the page.";
  if (status === 413) return `The picture is too large for this server. ${said ?? ""}`.trim();
  if (status === 429) return "The server is busy.";
  if (status === 503) return "The model is not ready yet.";
  return said || `The server answered with status ${status}.`;
}

/** The parsed data of each event of a stream of server-sent events. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError(0, "The connection broke before the answer was complete.");
    rest += value;
    const events = rest.split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** Send a conversation and give the parts of its answer to `show`. A busy server is asked again until `signal` says to stop. */
async function complete(messages, signal, show) {
  const body = { model: $("model").dataset.id, messages, stream: true, stream_options: { include_usage: true } };
  for (;;) {
    show.asked();
    try {
      const response = await call("v1/chat/completions", { body, signal });
      show.begun();
      for await (const event of eventsOf(response)) {
        if (event.error) throw new ServerError(0, event.error.message);
        const text = event.choices?.[0]?.delta?.content;
        if (text) show.text(text);
        if (event.usage) show.usage(event.usage, event.timings);
      }
      return;
    } catch (error) {
      if (error.status !== 429 && error.status !== 503) throw error;
      for (let left = error.again; left > 0; left--) {
        show.waiting(`${error.message} It is asked again in ${left} s.`);
        await pause(1, signal);
      }
    }
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    signal?.addEventListener("abort", stop, { once: true });
    if (signal?.aborted) stop();
  });
}

let watching = false;

/** Ask for the server's health until it is ready, then for its model. */
async function watchHealth() {
  if (watching) return;
  watching = true;
  for (let state = ""; state !== "ready"; ) {
    const status = await fetch("health").then((response) => response.status, () => 0);
    state = status === 200 ? "ready" : status ? "loading" : "gone";
    $("health").dataset.state = state;
    $("health").textContent = { ready: "Ready", loading: "The model is loading …", gone: "The server does not answer" }[state];
    if (state !== "ready") await pause(2);
  }
  watching = false;
  await readModel();
}

async function readModel() {
  try {
    const props = await (await call("props")).json();
    imageSize = props.image_size;
    covers = props.geometry === "crop";
    $("model").dataset.id = props.model;
    $("model").textContent = [props.model, props.precision, props.backend.description].join(" · ");
    $("key-form").hidden = true;
  } catch (error) {
    if (error.status !== 401) tell(error.message);
  }
}

function askForKey() {
  kept(() => sessionStorage.removeItem(KEY));
  $("key-form").hidden = false;
  $("key").focus();
}

/** What `storage` does, or null in a browser that keeps nothing. */
function kept(storage) {
  try {
    return storage();
  } catch {
    return null;
  }
}

// The picture -----------------------------------------------------------------------------------------------------------

/** A picture or frame as a data: URL of a JPEG that is no larger than the model can use. */
function reduced(source, width, height) {
  const scale = Math.min(1, imageSize / (covers ? Math.min(width, height) : Math.max(width, height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const drawing = canvas.getContext("2d");
  drawing.imageSmoothingQuality = "high";
  drawing.fillStyle = "white"; // under transparent pixels
  drawing.fillRect(0, 0, canvas.width, canvas.height);
  drawing.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", JPEG_QUALITY);
}

async function readFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    tell(`This browser cannot read ${file.name || "this file"}. Use a JPEG, PNG or WebP picture.`);
    return;
  }
  const small = Math.max(bitmap.width, bitmap.height) <= imageSize && SENT_AS_IT_IS.includes(file.type);
  const url = small ? await dataUrl(file) : reduced(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
  if (isLive()) running?.abort(); // a continuous run
  stopCamera();
  showPicture(url);
  $("question").focus();
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Show a picture; the next question begins a conversation about it, or continues `with_`. */
function showPicture(url, with_ = null) {
  picture = url;
  setConversation(with_);
  tell("");
  if (url) $("still").src = url;
  showStage();
}

function setConversation(next) {
  conversation?.card.removeAttribute("data-current");
  conversation = next;
  conversation?.card.setAttribute("data-current", "");
}

const isLive = () => camera !== null && picture === null;

function showStage() {
  video.hidden = $("live").hidden = !isLive();
  $("still").hidden = picture === null;
  $("empty").hidden = picture !== null || isLive();
  $("camera").textContent = isLive() ? "Stop the camera" : camera ? "Back to the camera" : "Camera";
  $("camera").setAttribute("aria-pressed", String(isLive()));
  if (isLive() && video.paused) video.play().catch(() => {}); // some browsers pause a video that is hidden
}

// The camera ------------------------------------------------------------------------------------------------------------

let starts = 0;

async function startCamera(choice = { facingMode: "environment" }) {
  if (!navigator.mediaDevices?.getUserMedia) {
    const port = location.port || (location.protocol === "https:" ? 443 : 80);
    tell(
      window.isSecureContext
        ? "This browser gives no camera to pages."
        : "Browsers give the camera only to pages on https or localhost. Start the server with --tls self-signed, or open this page " +
            `through: ssh -L ${port}:localhost:${port} ${location.hostname}`,
    );
    return false;
  }
  stopCamera();
  const start = ++starts;
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { ...choice, width: { ideal: 1280 }, height: { ideal: 960 } } });
    if (start !== starts) {
      stopTracks(stream); // another start or a picture came between
      return false;
    }
    camera = stream;
    video.srcObject = stream;
    showPicture(null);
    await video.play();
    stream.getVideoTracks()[0].onended = () => {
      stopCamera();
      showStage();
      tell("The camera has stopped.");
    };
  } catch (error) {
    stopCamera();
    showStage();
    const reasons = {
      NotAllowedError: "The camera is not allowed. Allow it for this page in the browser's address bar.",
      NotFoundError: "This device has no camera.",
      NotReadableError: "The camera is in use by another program.",
    };
    tell(reasons[error.name] ?? `The camera did not start: ${error.message}`);
    return false;
  }
  await listCameras();
  return true;
}

async function listCameras() {
  const devices = (await navigator.mediaDevices.enumerateDevices()).filter((device) => device.kind === "videoinput");
  const settings = camera?.getVideoTracks()[0].getSettings();
  const options = devices.map(({ label, deviceId }, index) => new Option(label || `Camera ${index + 1}`, deviceId));
  $("cameras").replaceChildren(...options);
  $("cameras").value = settings?.deviceId;
  $("cameras").hidden = devices.length < 2;
  $("flip").hidden = devices.length < 2 || !settings?.facingMode; // phones
}

function stopTracks(stream) {
  for (const track of stream?.getTracks() ?? []) {
    track.onended = null;
    track.stop();
  }
}

function stopCamera() {
  starts += 1;
  stopTracks(camera);
  camera = video.srcObject = null;
  $("cameras").hidden = $("flip").hidden = true;
}

const frame = () => reduced(video, video.videoWidth, video.videoHeight);

// Questions and answers -------------------------------------------------------------------------------------------------

/** The conversation as the API takes it: the picture stands in its first question. */
function messagesOf({ picture, turns }, question) {
  const answered = turns.filter((turn) => turn.answer);
  const messages = answered.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  messages.push({ role: "user", content: question });
  messages[0].content = [
    { type: "image_url", image_url: { url: picture } },
    { type: "text", text: messages[0].content },
  ];
  return messages;
}

function element(name, className, ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}

/** A card for a picture and what is asked about it, at the top of the answers. */
function beginConversation(picture) {
  const card = element("article", "card conversation");
  const begun = { picture, turns: [], card };
  const thumbnail = element("img", "");
  thumbnail.alt = "";
  const again = element("button", "again", thumbnail);
  again.type = "button";
  again.setAttribute("aria-label", "Ask more about this picture");
  again.onclick = () => {
    if (running) return;
    stopCamera();
    showPicture(begun.picture, begun);
    $("question").focus();
  };
  begun.setPicture = (url) => {
    begun.picture = thumbnail.src = url;
  };
  begun.setPicture(picture);
  card.append(again, element("div", "turns"));
  $("answers").prepend(card);
  $("nothing").hidden = true;
  $("clear").hidden = false;
  return begun;
}

/** A question with the place for its answer. Its methods show the answer while it is written. */
function addTurn(card, question) {
  const asked = element("p", "asked", question);
  const answer = element("p", "answer");
  const figures = element("p", "figures");
  const turn = element("div", "turn", asked, answer, figures);
  card.querySelector(".turns").append(turn);
  let sent, first, last, pieces; // as they come
  let tokens, cached, decoding; // as the server says at the end

  function showFigures() {
    const parts = [];
    if (first) parts.push(`first token ${seconds(first - sent)}`);
    const count = tokens ?? pieces;
    const ms = decoding ?? last - first;
    if (count > 1 && ms >= SHORTEST) parts.push(`${(((count - 1) * 1000) / ms).toFixed(1)} tokens/s`);
    if (count) parts.push(count === 1 ? "1 token" : `${count} tokens`);
    if (cached) parts.push(`${cached} prompt tokens cached`);
    figures.textContent = parts.join(" · ");
  }

  return {
    asked() {
      sent = performance.now();
      first = last = tokens = cached = decoding = undefined;
      pieces = 0;
      this.written = "";
      turn.setAttribute("aria-busy", "true");
    },
    waiting(text) {
      figures.textContent = text;
    },
    begun() {
      figures.textContent = "";
      answer.classList.remove("failed");
    },
    text(text) {
      last = performance.now();
      first ??= last;
      pieces += 1;
      this.written += text;
      answer.textContent = this.written;
      showFigures();
    },
    usage(usage, timings) {
      tokens = usage.completion_tokens;
      cached = usage.prompt_tokens_details?.cached_tokens;
      decoding = timings?.predicted_ms;
      showFigures();
    },
    ended(note = this.written ? "" : "an answer without text") {
      turn.setAttribute("aria-busy", "false");
      answer.textContent = this.written;
      if (note) figures.append(figures.textContent ? ` · ${note}` : note);
    },
    failed(message) {
      this.ended("");
      answer.textContent = this.written ? `${this.written}\n${message}` : message;
      answer.classList.add("failed");
    },
    turn,
    written: "",
  };
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

/** Ask once and show the answer. Returns the text, which is incomplete if it was stopped or failed; `error` says why. */
async function answer(messages, view, signal) {
  try {
    await complete(messages, signal, view);
    view.ended();
    return { text: view.written };
  } catch (error) {
    if (signal.aborted) view.ended("stopped");
    else view.failed(error.message);
    if (!signal.aborted && !(error instanceof ServerError)) console.error(error);
    return { text: view.written, error };
  }
}

async function askOnce(question) {
  if (isLive()) showPicture(frame());
  if (conversation === null) setConversation(beginConversation(picture));
  const asked = conversation;
  const view = addTurn(asked.card, question);
  view.turn.scrollIntoView({ block: "nearest" });
  const { text, error } = await answer(messagesOf(asked, question), view, running.signal);
  asked.turns.push({ question, answer: text });
  say(error && !running.signal.aborted ? error.message : text);
}

/** Ask about the newest frame of the camera, again and again. */
async function askAgainAndAgain(question) {
  if (!isLive()) {
    if (camera) showPicture(null);
    else if (!(await startCamera())) return;
  }
  const signal = running.signal;
  const shown = beginConversation(frame());
  const view = addTurn(shown.card, question);
  const earlier = element("ol", "earlier");
  view.turn.append(earlier);
  let before = null; // {text, times, line} of the answer that stands there now
  while (!signal.aborted && isLive()) {
    const began = performance.now();
    const taken = new Date();
    shown.setPicture(frame());
    shown.turns = [];
    const { text, error } = await answer(messagesOf(shown, question), view, signal);
    const gone = error instanceof ServerError && (error.status === 0 || error.status >= 500);
    if (error && !gone) break;
    shown.turns = [{ question, answer: text }];
    if (gone) say(error.message);
    else if (text === before?.text) {
      before.times += 1;
      before.line.lastChild.textContent = ` (${before.times} times)`;
    } else {
      before = { text, times: 1, line: element("li", "", element("time", "", taken.toLocaleTimeString()), text, element("span", "")) };
      earlier.prepend(before.line);
      while (earlier.childElementCount > KEPT_ANSWERS) earlier.lastElementChild.remove();
      say(text);
    }
    const every = Math.max(Number($("interval").value), gone ? PAUSE_AFTER_A_FAULT : 0);
    const left = every - (performance.now() - began) / 1000;
    await pause(Math.max(0, left), signal).catch(() => {});
  }
}

async function submit() {
  const question = $("question").value.trim();
  if (running || !question) {
    $("question").focus();
    return;
  }
  if (!picture && !camera && !$("continuous").checked) {
    tell("First choose a picture, or start the camera.");
    return;
  }
  const hadFocus = document.activeElement;
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  if (hadFocus === $("send")) $("stop").focus();
  tell("");
  try {
    await ($("continuous").checked ? askAgainAndAgain(question) : askOnce(question));
  } finally {
    running = null;
    const back = document.activeElement === $("stop");
    $("send").hidden = false;
    $("stop").hidden = true;
    if (back) $("question").focus();
  }
}

/** A fault that concerns the whole page; an empty text removes it. */
function tell(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/** For screen readers: a whole answer, not each of its pieces. */
function say(text) {
  $("said").textContent = text;
}

// What people do --------------------------------------------------------------------------------------------------------

$("ask").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
$("stop").onclick = () => running?.abort();
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
  }
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
for (const preset of document.querySelectorAll(".presets button")) {
  preset.onclick = () => {
    $("question").value = preset.dataset.question;
    submit();
  };
}
$("continuous").onchange = () => {
  $("interval").hidden = !$("continuous").checked;
  if (!$("continuous").checked) running?.abort();
};

$("camera").onclick = () => {
  if (isLive()) {
    running?.abort(); // a continuous run
    stopCamera();
    showStage();
  } else if (camera) showPicture(null);
  else startCamera();
};
$("cameras").onchange = () => startCamera({ deviceId: { exact: $("cameras").value } });
$("flip").onclick = () => {
  const now = camera?.getVideoTracks()[0].getSettings().facingMode;
  startCamera({ facingMode: now === "user" ? "environment" : "user" });
};

$("choose").onclick = () => $("file").click();
$("file").onchange = () => {
  if ($("file").files[0]) readFile($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
};
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    readFile(file);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("stage").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("stage").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  if (event.dataTransfer.files[0]) readFile(event.dataTransfer.files[0]);
  else if (event.dataTransfer.types.includes("text/uri-list")) tell("Drop the picture file itself, not a link to it.");
});

$("clear").onclick = () => {
  running?.abort();
  setConversation(null);
  $("answers").replaceChildren();
  $("nothing").hidden = false;
  $("clear").hidden = true;
  $("question").focus();
};

$("key-form").onsubmit = (event) => {
  event.preventDefault();
  kept(() => sessionStorage.setItem(KEY, $("key").value));
  $("key").value = "";
  tell("");
  readModel();
};

$("theme").onclick = () => {
  const now = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const next = now === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  kept(() => localStorage.setItem(THEME, next));
};

const theme = kept(() => localStorage.getItem(THEME));
if (theme) document.documentElement.dataset.theme = theme;
showStage();
watchHealth();
