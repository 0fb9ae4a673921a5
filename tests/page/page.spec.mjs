// The page in a browser, of a real box: what a person sees and does, and what goes wrong around it.

import { readFileSync } from "node:fs";
import { openBox, shipped } from "./box.mjs";
import { expect, test } from "./fixtures.mjs";

/** What the browser itself logs when a server is away. */
const AWAY = /ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE/;

const tile = (page, id) => page.locator(`.tile[data-camera="${id}"]`);
const picture = (page, id) => tile(page, id).locator("canvas");
const frame = async (page, id) => Number((await picture(page, id).getAttribute("data-frame")) ?? -1);

/** Live pictures of a camera go on. */
async function goesOn(page, id) {
  const before = await frame(page, id);
  await expect.poll(() => frame(page, id), { message: `${id} goes on after frame ${before}` }).toBeGreaterThan(before);
}

test("live pictures, their boxes where the objects are, moving", async ({ open, page, look }) => {
  await page.goto((await open()).url);
  await expect(tile(page, "line-a")).toContainText("streaming");
  await expect(picture(page, "line-a")).toHaveAttribute("data-objects", /[1-9]/);
  // The page's own module tells of each picture that it has just drawn.
  const { boxes, drawn, seconds } = await page.evaluate(async () => {
    const { colour, listen } = await import("/live.js");
    const canvas = document.querySelector('[data-camera="line-a"] canvas');
    const [boxes, began] = [[], performance.now()];
    let drawn = 0;
    return new Promise((resolve) => listen((head) => {
      if (head.camera !== "line-a") return;
      for (const { label, box } of head.objects) {
        const [x, y] = [Math.floor(box.x1 * canvas.width), Math.floor(((box.y1 + box.y2) / 2) * canvas.height)];
        const [r, g, b] = canvas.getContext("2d").getImageData(Math.min(x, canvas.width - 1), y, 1, 1).data;
        const hex = `#${[r, g, b].map((v) => v.toString(16).padStart(2, "0")).join("")}`;
        boxes.push({ label, x: box.x1, isDrawn: hex === colour(label) });
      }
      if (++drawn === 20) resolve({ boxes, drawn, seconds: (performance.now() - began) / 1000 });
    }));
  });
  const plates = boxes.filter(({ label }) => label === "plate").map(({ x }) => x);
  expect(new Set(plates).size, "places in which a plate was").toBeGreaterThan(10);
  expect(boxes.filter(({ isDrawn }) => isDrawn).length, "boxes drawn where the model found something").toBeGreaterThan(boxes.length * 0.8);
  console.log(`  ${(drawn / seconds).toFixed(1)} pictures a second`);
  await goesOn(page, "line-b");
  await look("live");
});

test("light and quick: its weight, its first paint, nothing from elsewhere", async ({ open, page }) => {
  const box = await open();
  const [elsewhere, files] = [[], []];
  page.on("request", (request) => new URL(request.url()).origin === box.url || elsewhere.push(request.url()));
  page.on("response", (response) => /events|live/.test(new URL(response.url()).pathname) || files.push(response));
  const paints = [];
  for (let load = 0; load < 3; load++) {
    files.length = 0;
    await page.goto(box.url);
    await expect(tile(page, "line-a")).toBeVisible();
    paints.push(await page.evaluate(() => performance.getEntriesByName("first-contentful-paint")[0].startTime));
  }
  const sizes = await Promise.all(files.map(async (file) => (await file.body()).length));
  const weight = sizes.reduce((sum, size) => sum + size, 0);
  console.log(`  ${files.length} files of ${Math.round(weight / 1000)} kB, first paint after ${Math.round(Math.min(...paints))} ms`);
  expect(weight).toBeLessThan(300_000);
  expect(Math.min(...paints), "of three loads on a machine that may be busy").toBeLessThan(1000);
  expect(elsewhere).toEqual([]);
});

test.describe.serial("the life of a model", () => {
  let box;
  // No frame is to be dropped, on whatever machine with a browser beside it.
  test.beforeAll(async () => { box = await openBox({ each: "max_fps = 5" }); });
  test.afterAll(() => box?.close());
  test.beforeEach(async ({ page }) => {
    await page.goto(box.url);
    await expect(picture(page, "line-a")).toHaveAttribute("data-objects", /[1-9]/);
  });
  test.setTimeout(120_000);
  const ended = (page) => page.locator("#story > li").first();
  const runs = (page) => page.locator("#models .card").first();

  test("dropped onto the page, it is followed to the swap", async ({ page, look }) => {
    await expect(runs(page)).toContainText("plates 1");
    const bytes = readFileSync(shipped("models/plates-v2.onnx")).toString("base64");
    const dropped = await page.evaluateHandle((base64) => {
      const transfer = new DataTransfer();
      const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
      transfer.items.add(new File([bytes], "plates-v2.onnx"));
      return transfer;
    }, bytes);
    await page.dispatchEvent("#drop", "dragenter", { dataTransfer: dropped });
    await page.dispatchEvent("#drop", "drop", { dataTransfer: dropped });
    await expect(page.locator("#job")).toContainText("plates-v2.onnx");
    await expect(page.locator("#job .now")).toContainText("try it out");
    await look("job");
    await expect(page.locator("#job .gates")).toContainText("recall", { timeout: 60_000 });
    await expect(page.locator("#job .now")).toContainText("watch it live", { timeout: 60_000 });
    await look("probation");
    await expect(ended(page)).toContainText("plates 2 went live, no frame lost", { timeout: 60_000 });
    await expect(runs(page)).toContainText("plates 2");
    await expect(page.locator("#health")).toContainText("model plates 2");
    await expect(picture(page, "line-a")).toHaveAttribute("data-epoch", "2");
    await ended(page).locator("summary").click();
    const dots = (kind) => ended(page).locator(`svg circle.${kind}`).count();
    expect(await dots("old"), "results of plates 1").toBeGreaterThan(3);
    expect(await dots("new"), "results of plates 2").toBeGreaterThan(3);
    await look("swap");
  });

  test("a bad one is refused, and why stands there", async ({ page, look }) => {
    await page.locator("#file").setInputFiles(shipped("models/plates-v3.onnx"));
    await expect(ended(page)).toContainText(/plates 3 refused: finds \d+ of \d+ "scratch", the active model \d+/, { timeout: 60_000 });
    await expect(runs(page)).toContainText("plates 2");
    await ended(page).locator("summary").click();
    await expect(ended(page).locator(".gates .FAILED")).toHaveCount(1);
    await look("refused");
  });

  test("what is no model is refused at once", async ({ page }) => {
    await page.locator("#file").setInputFiles({ name: "best.pt", mimeType: "application/octet-stream", buffer: Buffer.from("PK") });
    await expect(page.locator("#upload")).toContainText("yolo export model=best.pt format=onnx");
    await page.locator("#file").setInputFiles({ name: "holiday.onnx", mimeType: "application/octet-stream", buffer: Buffer.from("not a model") });
    await expect(ended(page)).toContainText("holiday");
    await expect(ended(page)).toContainText("refused");
    await expect(runs(page)).toContainText("plates 2");
  });

  test("one button brings the model before back", async ({ page, look }) => {
    await page.getByRole("button", { name: "Roll back to plates 1" }).click();
    await expect(runs(page)).toContainText("plates 1");
    await expect(ended(page)).toContainText("back to plates 1");
    await expect(picture(page, "line-a")).toHaveAttribute("data-epoch", "3");
    await look("rolled-back");
  });
});

test("a camera is killed, and comes back", async ({ open, page, look }) => {
  const box = await open();
  await page.goto(box.url);
  await goesOn(page, "line-a");
  await goesOn(page, "line-b");
  await box.cameras["line-a"].kill();
  await expect(tile(page, "line-a")).toContainText("down");
  await expect(page.locator("#health")).toContainText("camera line-a is down");
  await goesOn(page, "line-b");
  await look("camera-down");
  await box.cameras["line-a"].start();
  await expect(tile(page, "line-a")).toContainText("streaming", { timeout: 45_000 });
  await goesOn(page, "line-a");
});

test("the broker is killed, and comes back", async ({ open, page, look }) => {
  const box = await open();
  await page.goto(box.url);
  const health = page.locator("#health");
  await expect(health).toContainText("broker connected");
  await box.broker.kill();
  await expect(health).toContainText("broker away");
  await expect(health).toContainText(/\d+ records wait/);
  await goesOn(page, "line-a");
  await look("broker-down");
  await box.broker.start();
  await expect(health).toContainText("broker connected", { timeout: 45_000 });
  await expect(health).not.toContainText("records wait");
});

test.describe("the service itself is killed", () => {
  test.use({ expected: AWAY });
  test("the page says so, and comes back with it", async ({ open, page, look }) => {
    const box = await open();
    await page.goto(box.url);
    await goesOn(page, "line-a");
    await box.service.kill();
    await expect(page.locator("#health")).toContainText("the box does not answer");
    await look("service-down");
    await page.locator("#file").setInputFiles(shipped("models/plates-v2.onnx"));
    await expect(page.locator("#upload")).toContainText("the box does not answer: is noblink running");
    await expect(page.getByRole("alert")).toContainText("What you see is from");
    await box.service.start();
    await expect(page.getByRole("alert")).toBeHidden();
    await expect(page.locator("#health")).not.toContainText("does not answer");
    await expect(page.locator("#health")).toContainText("broker connected");
    await goesOn(page, "line-a");
    await expect(page.locator("#log li", { hasText: "the page is at" })).toHaveCount(1);
  });
});

test("a camera in large, with what it sees", async ({ open, page, look }) => {
  await page.goto((await open()).url);
  await tile(page, "line-a").click();
  const large = page.getByRole("dialog", { name: "line-a" });
  await expect(large.locator("#sees")).toContainText("plate");
  await expect(large.locator("#large-facts")).toContainText("1280×720");
  await expect(large.locator("canvas")).toHaveAttribute("data-objects", /[1-9]/);
  await look("large", {});
  await page.keyboard.press("Escape");
  await expect(large).toBeHidden();
});

test("by keyboard alone", async ({ open, page }) => {
  await page.goto((await open()).url);
  await expect(tile(page, "line-b")).toContainText("streaming");
  const focused = page.locator(":focus");
  await page.keyboard.press("Tab");
  await expect(focused).toHaveText("To the cameras");
  await page.keyboard.press("Enter");
  await page.keyboard.press("Tab");
  await expect(focused).toHaveAttribute("data-camera", "line-a");
  // What changes every second must not take the focus away.
  await goesOn(page, "line-a");
  await page.keyboard.press("Tab");
  await expect(focused).toHaveAttribute("data-camera", "line-b");
  await page.keyboard.press("Enter");
  await expect(page.getByRole("dialog", { name: "line-b" })).toBeVisible();
  await expect(focused).toHaveText("Close");
  await page.keyboard.press("Enter");
  await expect(page.getByRole("dialog")).toBeHidden();
  await expect(focused).toHaveAttribute("data-camera", "line-b");
  await page.keyboard.press("Tab");
  await expect(focused).toHaveAttribute("id", "file");
  await page.keyboard.press("Tab");
  await expect(focused).toHaveAttribute("id", "log");
});

for (const colorScheme of ["light", "dark"]) {
  test.describe(`on a phone, ${colorScheme}`, () => {
    test.use({ colorScheme, viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true });
    test("all of it fits", async ({ open, page, look }) => {
      await page.goto((await open()).url);
      await expect(picture(page, "line-b")).toHaveAttribute("data-objects", /[1-9]/);
      await expect(tile(page, "line-b")).toContainText("frames/s");
      expect(await page.evaluate(() => document.documentElement.scrollWidth - innerWidth), "pixels to scroll sideways").toBeLessThanOrEqual(0);
      await look(`phone-${colorScheme}`);
      await tile(page, "line-b").tap();
      await expect(page.locator("#sees")).toContainText("plate");
      await look(`phone-${colorScheme}-large`, {});
    });
  });
}

test.describe("dark", () => {
  test.use({ colorScheme: "dark" });
  test("on a desk", async ({ open, page, look }) => {
    await page.goto((await open()).url);
    await expect(picture(page, "line-a")).toHaveAttribute("data-objects", /[1-9]/);
    await expect(tile(page, "line-a")).toContainText("frames/s");
    await look("dark");
  });
});

test.describe("elsewhere than on loopback", () => {
  test.use({ expected: /401 \(Unauthorized\)/ });
  test("the token is a wall", async ({ open, page, look }) => {
    const token = "0123456789abcdef";
    await page.goto((await open({ token })).url);
    const wall = page.getByRole("dialog", { name: "This box wants its token" });
    await expect(wall).toBeVisible();
    await expect(page.locator(".tile")).toHaveCount(0);
    await look("token");
    await page.keyboard.press("Escape");
    await expect(wall).toBeVisible();
    await page.getByLabel("Token", { exact: true }).fill("not the token at all");
    await page.getByRole("button", { name: "Log in" }).click();
    await expect(wall).toContainText("this is not the token");
    await page.getByLabel("Token", { exact: true }).fill(token);
    await page.keyboard.press("Enter");
    await expect(wall).toBeHidden();
    await goesOn(page, "line-a");
  });
});

test("no model yet, no camera yet: what to do next", async ({ open, page, look }) => {
  await page.goto((await open({ models: "", cameras: [] })).url);
  await expect(page.locator("#advice")).toContainText("noblink model push");
  await expect(page.locator("#advice")).toContainText("noblink probe");
  await expect(page.locator("#cameras")).toContainText("No camera is configured");
  await look("empty");
});
