// What on the page has no accessible name (WCAG 2.2, 4.1.2), and what text differs too little from its ground (1.4.3).
() => {
  const options = { visibilityProperty: true, opacityProperty: true };
  const seen = (e) => e.checkVisibility(options) && e.getClientRects().length > 0;
  const rgba = (text) => (text.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = rgba(getComputedStyle(e).backgroundColor);
      if (a > 0.5) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const unnamed = [], faint = [];
  const controls = "input:not([type=hidden]), textarea, select, button, canvas, [role=slider]";
  for (const e of document.querySelectorAll(controls)) {
    if (!seen(e)) continue;
    const ids = (e.getAttribute("aria-labelledby") || "").split(" ");
    const named = ids.some((id) => document.getElementById(id)?.innerText);
    const label = [...(e.labels || [])].some((l) => l.innerText.trim());
    if (!named && !label && !e.getAttribute("aria-label") && !e.title && !e.innerText.trim())
      unnamed.push(e.outerHTML.slice(0, 150));
  }
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !seen(e) || e.closest("[disabled], [aria-hidden=true]")) continue;
    const [front, back] = [light(rgba(getComputedStyle(e).color).slice(0, 3)), light(ground(e))];
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < 4.5) faint.push(`${walk.currentNode.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return { unnamed, faint };
}
