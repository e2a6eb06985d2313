// A picture of a page in Chromium: of a report, or of TensorBoard.
//   npm install playwright-core && node scripts/screenshot.js results/NAME/report/index.html page.png 1280
//   tensorboard --logdir runs & node scripts/screenshot.js http://localhost:6006/ board.png 1280 900
// Four words: address, picture, width and, for what is seen without scrolling, height.
const { chromium } = require('playwright-core');
const [address, picture, width, height] = process.argv.slice(2);

(async () => {
  const browser = await chromium.launch({
    executablePath: '/usr/bin/chromium',
    args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-sync', '--no-first-run'],
  });
  const page = await browser.newPage({ viewport: { width: Number(width), height: Number(height || 900) } });
  page.on('pageerror', (error) => { console.error(error.message); process.exitCode = 1; });
  await page.goto(address.includes('://') ? address : `file://${require('path').resolve(address)}`);
  await page.waitForTimeout(height ? 9000 : 2000);
  await page.screenshot({ path: picture, fullPage: !height });
  await browser.close();
})();
