// What each test has: a page that reports its errors, a judge of accessibility, pictures to look at.

import { test as base, expect } from "@playwright/test";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { openBox, shipped } from "./box.mjs";

export { expect };

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

export const test = base.extend({
  /** Opens boxes that end with the test. */
  open: async ({}, use) => {
    const boxes = [];
    await use(async (options) => boxes[boxes.push(await openBox(options)) - 1]);
    for (const box of boxes) await box.close();
  },

  /** Errors that the browser may report in this test: those that it is about. */
  expected: [/^$/, { option: true }],

  /** No page may report an error of its own. */
  page: async ({ page, expected }, use) => {
    const errors = [];
    page.on("console", (message) => message.type() === "error" && errors.push(`${message.text()} (${message.location().url})`));
    page.on("pageerror", (error) => errors.push(error.message));
    await use(page);
    expect(errors.filter((text) => !expected.test(text)), "the console's errors").toEqual([]);
  },

  /** A picture in target/page, of a page that axe has no serious objection to. */
  look: async ({ page }, use) => {
    await use(async (name, options = { fullPage: true }) => {
      await page.screenshot({ path: shipped(`target/page/${name}.png`), ...options });
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => globalThis.axe.run());
      const serious = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
      expect(serious.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(" ")}`), `axe on ${name}`).toEqual([]);
    });
  },
});
