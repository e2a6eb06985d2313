// A picture of a page in Chromium: of a report, or of TensorBoard.
//   npm install playwright-core && node scripts/screenshot.js results/NAME/report/index.html page.png 390 '' dark
//   tensorboard --logdir runs & node scripts/screenshot.js http://localhost:6006/ board.png 1280 900
// Words: address, picture, width; for what is seen without scrolling the height; light (the default) or dark.
// Also says where the page itself is wider than the screen, so that something would be cut off.
const { chromium } = require('playwright-core');
const [address, picture, width, height, colorScheme] = process.argv.slice(2);

(async () => {
  const browser = await chromium.launch({
    executablePath: '/usr/bin/chromium',
    args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-sync', '--no-first-run'],
  });
  const page = await browser.newPage({ viewport: { width: Number(width), height: Number(height || 900) }, colorScheme });
  const fail = (words) => { console.error(words); process.exitCode = 1; };
  page.on('pageerror', (error) => fail(error.message));
  await page.goto(address.includes('://') ? address : `file://${require('path').resolve(address)}`);
  await page.waitForTimeout(height ? 9000 : 2000);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  if (wide > width) fail(`the page is ${wide} px wide on a screen of ${width}`);
  await page.screenshot({ path: picture, fullPage: !height });
  await browser.close();
})();
