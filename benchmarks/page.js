// Drives the page of a running server in Chromium: by keyboard, on a phone, in the dark, with a broken file; takes pictures.
//
// Command: npm install playwright-core; node benchmarks/page.js http://127.0.0.1:8000 PICTURE FOLDER
// Fails if a request leaves the server, the page is wider than a phone, or a result or problem does not show.
const fs = require("fs");
const path = require("path");
const { chromium } = require("playwright-core");

const [server, picture, folder] = process.argv.slice(2);
const broken = path.join(folder, "broken.png");
fs.mkdirSync(folder, { recursive: true });
fs.writeFileSync(broken, fs.readFileSync(picture).subarray(0, 200));
const views = [
  { name: "phone", width: 390, height: 844, colorScheme: "light", file: picture },
  { name: "keyboard-dark", width: 1280, height: 900, colorScheme: "dark", file: picture, keyboard: true },
  { name: "broken", width: 390, height: 844, colorScheme: "dark", file: broken, fails: true },
];

async function look(browser, view) {
  const context = await browser.newContext({
    viewport: { width: view.width, height: view.height },
    colorScheme: view.colorScheme,
  });
  const page = await context.newPage();
  const elsewhere = [];
  page.on("request", (request) => {
    if (![server, "data:", "blob:"].some((start) => request.url().startsWith(start))) elsewhere.push(request.url());
  });
  await page.goto(server);
  if (view.keyboard) {
    await page.waitForFunction(() => document.hasFocus()); // a key that comes sooner goes nowhere
    await page.keyboard.press("Tab");
    const [chooser] = await Promise.all([page.waitForEvent("filechooser"), page.keyboard.press("Enter")]);
    await chooser.setFiles(view.file);
  } else {
    await page.setInputFiles("#file", view.file);
  }
  const wanted = view.fails ? "#status.problem" : "#result:not([hidden])";
  await page.waitForSelector(wanted, { timeout: 10000 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  await page.screenshot({ path: path.join(folder, `${view.name}.png`), fullPage: true });
  const told = await page.textContent(view.fails ? "#status" : "#verdict");
  console.log(JSON.stringify({ view: view.name, told, wide, elsewhere }));
  await context.close();
  return !wide && elsewhere.length === 0 && told.trim() !== "";
}

(async () => {
  const options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: options });
  const fine = [];
  for (const view of views) fine.push(await look(browser, view));
  await browser.close();
  process.exit(fine.every(Boolean) ? 0 : 1);
})();
