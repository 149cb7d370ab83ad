"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const places = [...document.querySelectorAll(".plot")];
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // On a dark page colours keep their hue and become lighter, in the same order; black becomes white.
  function onDark(colour) {
    if (!/^#[0-9a-f]{6}([0-9a-f]{2})?$/i.test(colour)) return colour;
    const [red, green, blue] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255);
    const [high, low] = [Math.max(red, green, blue), Math.min(red, green, blue)];
    if (high === 0) return "#ffffff" + colour.slice(7);
    const lightness = (high + low) / 2;
    const lighter = 0.45 + 0.5 * lightness;
    const span = (high - low) / (lightness < 0.5 ? high + low : Math.max(2 - high - low, 1e-6));
    const reach = span * (1 - Math.abs(2 * lighter - 1)) / 2;
    const scaled = (x) => (high === low ? 0 : ((x - low) / (high - low)) * 2 - 1) * reach + lighter;
    const digits = (x) => Math.round(255 * Math.min(1, x)).toString(16).padStart(2, "0");
    return "#" + [red, green, blue].map((x) => digits(scaled(x))).join("") + colour.slice(7);
  }

  function recoloured(value, key) {
    if (Array.isArray(value)) return value.map((item) => recoloured(item, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, recoloured(item, name)]));
    }
    return key === "color" && typeof value === "string" ? onDark(value) : value;
  }

  // A long name in two or three lines: a phone has no room for one.
  function inLines(name) {
    const lines = [""];
    for (const word of name.split(" ")) {
      const last = lines.at(-1);
      if (last && last.length + word.length > 18) lines.push(word);
      else lines[lines.length - 1] = (last + " " + word).trim();
    }
    return lines.join("<br>");
  }

  function axis(given, style) {
    return { ...given, gridcolor: style.line, linecolor: style.soft, zerolinecolor: style.soft, automargin: true };
  }

  function hiddenIn(place) {
    const keys = place.closest("section").querySelectorAll('.keys [aria-pressed="false"]');
    return new Set([...keys].map((key) => key.dataset.group));
  }

  function draw(place, isDark) {
    const figure = figures[Number(place.dataset.figure)];
    const css = getComputedStyle(document.documentElement);
    const style = Object.fromEntries(["ink", "soft", "line", "raised"].map((name) => [name, css.getPropertyValue("--" + name).trim()]));
    const width = place.clientWidth;
    const hasLegend = figure.layout.showlegend === true;
    const isNarrow = width < 500;
    const bars = ((figure.layout.meta || {}).rows || 0) * (isNarrow ? 46 : 24);
    const rows = figure.data[0].type === "heatmap" ? 60 + Math.min(420, 14 * figure.data[0].y.length) : 0;
    const body = Math.max(bars, rows, isNarrow ? 250 : 310);
    const layout = {
      ...(isDark ? recoloured(figure.layout) : figure.layout),
      template: null,
      width,
      height: body + (hasLegend ? 100 : 70),
      margin: { l: 50, r: 14, t: 14, b: hasLegend ? 80 : 50 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: style.ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: style.raised, bordercolor: style.line, font: { color: style.ink } },
      showlegend: hasLegend,
      legend: { orientation: "h", x: 0, xref: "container", y: 0, yref: "container", yanchor: "bottom" },
      xaxis: axis(figure.layout.xaxis, style),
      yaxis: { ...axis(figure.layout.yaxis, style), ...(bars && isNarrow ? { tickfont: { size: 10 } } : {}) },
    };
    const hidden = hiddenIn(place);
    const data = structuredClone(isDark ? recoloured(figure.data) : figure.data);
    for (const trace of data) {
      if (hidden.has(trace.legendgroup)) trace.visible = false;
      if (bars && isNarrow) trace.y = trace.y.map(inLines);
    }
    const config = { displaylogo: false, displayModeBar: width > 500 ? "hover" : false, responsive: false, showLink: false };
    return Plotly.react(place, data, layout, config);
  }

  function drawAll(isDark) {
    for (const drawing of document.querySelectorAll(".keys path")) {
      for (const name of ["fill", "stroke"]) {
        const colour = drawing.dataset[name] || drawing.getAttribute(name);
        if (!colour || colour === "none") continue;
        drawing.dataset[name] = colour;
        drawing.setAttribute(name, isDark ? onDark(colour) : colour);
      }
    }
    return Promise.all(places.map((place) => draw(place, isDark)));
  }

  function sortBy(header) {
    const table = header.closest("table");
    const column = [...header.parentNode.children].indexOf(header);
    const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const isNumeric = header.classList.contains("number");
    const key = (row) => {
      const value = row.children[column].dataset.value;
      return value === undefined ? null : isNumeric ? Number(value) : value;
    };
    const sign = direction === "ascending" ? 1 : -1;
    const order = (a, b) => (isNumeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [first, second] = [key(a), key(b)];
      if (first === null || second === null) return (first === null) - (second === null); // what is unknown stays below
      return sign * order(first, second);
    });
    table.tBodies[0].append(...rows);
    for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
  }

  for (const header of document.querySelectorAll("table.sortable th")) {
    header.querySelector("button").addEventListener("click", () => sortBy(header));
  }
  for (const key of document.querySelectorAll(".keys button")) {
    key.addEventListener("click", () => {
      key.setAttribute("aria-pressed", key.getAttribute("aria-pressed") === "true" ? "false" : "true");
      for (const place of key.closest("section").querySelectorAll(".plot")) draw(place, dark.matches);
    });
  }
  const closed = [];
  addEventListener("beforeprint", () => {
    closed.push(...document.querySelectorAll("details:not([open])"));
    for (const item of closed) item.open = true;
    drawAll(false);
  });
  addEventListener("afterprint", () => {
    for (const item of closed.splice(0)) item.open = false;
    drawAll(dark.matches);
  });
  dark.addEventListener("change", () => drawAll(dark.matches));
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // phones change the height while scrolling
    width = innerWidth;
    drawAll(dark.matches);
  });
  drawAll(dark.matches).then(() => document.documentElement.setAttribute("data-drawn", ""));
})();
