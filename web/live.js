// Live pictures with what was found on them: one request for all cameras that are in sight.

const COLOURS = ["#ffd166", "#5ad1e6", "#ff8fa3", "#9be564", "#c8a2ff", "#ffb066", "#7fb2ff", "#f4f4f4"];
const canvases = new Map(); // element → camera id
const inSight = new Set();
const listeners = new Set();
let controller = null;
let wanted = "";

const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) inSight.add(target);
    else inSight.delete(target);
  }
  choose();
});
document.addEventListener("visibilitychange", choose);

/** Draws a camera's pictures on a canvas whenever that is in sight. */
export function watch(canvas, camera) {
  canvases.set(canvas, camera);
  observer.observe(canvas);
}

export function unwatch(canvas) {
  canvases.delete(canvas);
  inSight.delete(canvas);
  observer.unobserve(canvas);
  choose();
}

/** Calls `listener(head)` for each picture that comes. */
export const listen = (listener) => listeners.add(listener);

function choose() {
  const seen = document.hidden ? [] : [...inSight].map((canvas) => canvases.get(canvas));
  const cameras = [...new Set(seen.filter(Boolean))].sort().join(",");
  if (cameras === wanted) return;
  wanted = cameras;
  controller?.abort();
  if (cameras) read(cameras, (controller = new AbortController()));
}

async function read(cameras, mine) {
  while (!mine.signal.aborted) {
    try {
      const response = await fetch(`/api/v1/live?cameras=${cameras}`, { signal: mine.signal });
      if (response.ok) await pictures(response.body.getReader());
    } catch {
      // The box is away; the page says so elsewhere.
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

/** Cuts the stream: length, length of the head, head, JPEG. */
async function pictures(reader) {
  let buffer = new Uint8Array(0);
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const joined = new Uint8Array(buffer.length + value.length);
    joined.set(buffer);
    joined.set(value, buffer.length);
    buffer = joined;
    for (;;) {
      const view = new DataView(buffer.buffer, buffer.byteOffset, buffer.length);
      if (buffer.length < 8 || buffer.length < 4 + view.getUint32(0)) break;
      const end = 4 + view.getUint32(0);
      const jpeg = 8 + view.getUint32(4);
      const head = JSON.parse(new TextDecoder().decode(buffer.subarray(8, jpeg)));
      const picture = await createImageBitmap(new Blob([buffer.slice(jpeg, end)], { type: "image/jpeg" }));
      for (const canvas of inSight) if (canvases.get(canvas) === head.camera) draw(canvas, head, picture);
      for (const listener of listeners) listener(head);
      picture.close();
      buffer = buffer.slice(end);
    }
  }
}

export function colour(label) {
  let sum = 0;
  for (const letter of label) sum = (sum * 31 + letter.charCodeAt(0)) >>> 0;
  return COLOURS[sum % COLOURS.length];
}

function draw(canvas, head, picture) {
  const scale = devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * scale);
  const height = Math.round((width * picture.height) / picture.width);
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
    canvas.style.aspectRatio = `${picture.width} / ${picture.height}`;
  }
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);
  context.lineWidth = 2 * scale;
  context.font = `${13 * scale}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const { label, score, box } of head.objects) {
    const [x, y] = [box.x1 * width, box.y1 * height];
    context.strokeStyle = context.fillStyle = colour(label);
    context.strokeRect(x, y, (box.x2 - box.x1) * width, (box.y2 - box.y1) * height);
    const text = `${label} ${Math.round(score * 100)}`;
    const line = 17 * scale;
    const above = y >= line ? y - line : y;
    const wide = context.measureText(text).width + 8 * scale;
    const from = Math.max(0, Math.min(x, width - wide));
    context.fillRect(from, above, wide, line);
    context.fillStyle = "#101010";
    context.fillText(text, from + 4 * scale, above + 2 * scale);
  }
  canvas.dataset.frame = head.frame;
  canvas.dataset.epoch = head.epoch;
  canvas.dataset.objects = head.objects.length;
}
