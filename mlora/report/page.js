"use strict";
(() => {
  const root = document.documentElement;
  const tip = document.getElementById("tip");

  // The theme follows the system until the reader chooses; a file opened from a disk may have no storage.
  const themes = { "light dark": "Auto", light: "Light", dark: "Dark" };
  const button = document.getElementById("theme");
  const store = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("mlora-theme");
      localStorage.setItem("mlora-theme", value);
    } catch { return null; }
  };
  const dress = (theme) => {
    root.style.colorScheme = theme;
    button.textContent = themes[theme];
    button.setAttribute("aria-label", `Colours: ${themes[theme]}`);
  };
  let theme = store() in themes ? store() : "light dark";
  dress(theme);
  button.hidden = false;
  button.addEventListener("click", () => {
    const names = Object.keys(themes);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    dress(theme);
    store(theme);
  });

  const number = (value) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  const say = (event, text) => {
    tip.textContent = text;
    tip.hidden = !text;
    if (!text) return;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4))}px`;
  };
  const place = (svg, event) => {
    const box = svg.getBoundingClientRect();
    const width = svg.viewBox.baseVal.width;
    return [(event.clientX - box.left) / box.width * width, (event.clientY - box.top) / box.width * width];
  };
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };

  const hover = {
    lines(figure, svg, data) {
      const cross = svg.querySelector(".cross");
      const [low, high, start, end] = data.x;
      return (x) => {
        const pointed = low + (x - start) / (end - start) * (high - low);
        const shown = data.lines.map((line, i) => [line, i])
          .filter(([line, i]) => line.steps.length && !figure.querySelectorAll(".legend li")[i]?.classList.contains("off"));
        if (!shown.length) return "";
        const all = shown.map(([line]) => line.steps[nearest(line.steps, pointed)]);
        const step = all.reduce((a, b) => Math.abs(b - pointed) < Math.abs(a - pointed) ? b : a);
        const at = start + (step - low) / (high - low) * (end - start);
        cross.setAttribute("d", `M${at} ${data.y[3]}V${data.y[2]}`);
        const texts = shown.map(([line]) => {
          const i = nearest(line.steps, step);
          const error = line.errors?.[i];
          const other = line.steps[i] === step ? "" : ` (step ${line.steps[i]})`;
          return `${line.name}: ${number(line.values[i])}${error == null ? "" : ` ± ${number(error)}`}${other}`;
        });
        return [`step ${step.toLocaleString("en")}, ${data.unit}`, ...texts].join("\n");
      };
    },
    heat(figure, svg, data) {
      const [left, top, width, height] = data.box;
      return (x, y) => {
        const layer = Math.floor((x - left) / width), expert = Math.floor((y - top) / height);
        const share = data.shares[layer]?.[expert];
        return share === undefined ? "" : `${data.of} ${data.names[layer]}, expert ${expert}\n${share} % of tokens, even is ${data.even} %`;
      };
    },
  };

  for (const figure of document.querySelectorAll("figure.chart")) {
    const svg = figure.querySelector(":scope > svg");
    const values = figure.querySelector("script");
    const make = hover[figure.dataset.kind];
    const read = make && make(figure, svg, JSON.parse(values.textContent));
    const show = (event) => {
      const text = read ? read(...place(svg, event)) : event.target.closest("[data-tip]")?.dataset.tip;
      say(event, text || "");
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => {
      tip.hidden = true;
      svg.querySelector(".cross")?.setAttribute("d", "");
    });
    figure.querySelector(".save").addEventListener("click", () => save(figure, svg));
    if (figure.dataset.kind === "lines") choose(figure, svg);
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // A line is hidden and shown again by its entry in the legend.
  function choose(figure, svg) {
    const items = [...figure.querySelectorAll(".legend li")];
    const levels = svg.querySelectorAll("g:has(.level)");
    const lines = [...svg.querySelectorAll("g:not(:has(.level))"), ...levels];
    if (items.length < 2) return;
    items.forEach((item, i) => {
      item.setAttribute("role", "button");
      item.tabIndex = 0;
      item.setAttribute("aria-pressed", "true");
      const toggle = () => {
        const off = item.classList.toggle("off");
        lines[i].classList.toggle("off", off);
        item.setAttribute("aria-pressed", String(!off));
      };
      item.addEventListener("click", toggle);
      item.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); }
      });
    });
  }

  // A picture of a figure: its SVG with the styles of the page written into it, below its title, above its legend.
  const STYLES = ["fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-dasharray", "stroke-linecap",
    "stroke-linejoin", "font-family", "font-size", "font-weight", "text-anchor", "display"];
  function dressed(svg) {
    const copy = svg.cloneNode(true);
    const originals = svg.querySelectorAll("*");
    copy.querySelectorAll("*").forEach((element, i) => {
      const style = getComputedStyle(originals[i]);
      for (const name of STYLES) element.style.setProperty(name, style.getPropertyValue(name));
    });
    const { width, height } = svg.viewBox.baseVal;
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    return copy;
  }
  function picture(svg) {
    return new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("the figure could not be drawn"));
      image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(dressed(svg)))}`;
    });
  }
  async function draw(figure, svg) {
    const { width, height } = svg.viewBox.baseVal;
    const scale = 3, margin = 16, head = 30, line = 20;
    const style = getComputedStyle(document.body);
    const canvas = document.createElement("canvas");
    const brush = canvas.getContext("2d");
    const items = [...figure.querySelectorAll(".legend li:not(.off)")];
    const font = (weight, size) => `${weight} ${size}px ${style.fontFamily}`;
    brush.font = font(400, 12);
    let x = 0, row = 0;
    const placed = items.map((item) => {
      const wide = 34 + brush.measureText(item.textContent).width + 16;
      if (x && x + wide > width) { x = 0; row += 1; }
      const at = [x, row];
      x += wide;
      return at;
    });
    const foot = items.length ? (row + 1) * line + 8 : 0;
    canvas.width = scale * (width + 2 * margin);
    canvas.height = scale * (head + height + foot + 2 * margin);
    brush.scale(scale, scale);
    brush.fillStyle = style.backgroundColor;
    brush.fillRect(0, 0, canvas.width, canvas.height);
    brush.translate(margin, margin);
    brush.fillStyle = style.color;
    brush.font = font(600, 15);
    brush.fillText(figure.querySelector("h3").textContent, 0, 14);
    brush.drawImage(await picture(svg), 0, head, width, height);
    for (const [i, item] of items.entries()) {
      const [left, top] = [placed[i][0], head + height + 16 + placed[i][1] * line];
      brush.drawImage(await picture(item.querySelector("svg")), left, top - 5, 26, 10);
      brush.fillStyle = style.color;
      brush.font = font(400, 12);
      brush.fillText(item.textContent, left + 32, top + 4);
    }
    return canvas;
  }
  async function save(figure, svg) {
    const canvas = await draw(figure, svg);
    const link = document.createElement("a");
    link.download = `${figure.querySelector("h3").textContent.replace(/[^\w.-]+/g, "-")}.png`;
    link.href = canvas.toDataURL("image/png");
    link.click();
  }

  for (const copy of document.querySelectorAll(".copy")) {
    copy.addEventListener("click", async () => {
      const code = copy.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        copy.textContent = "Selected";
      }
      setTimeout(() => { copy.textContent = "Copy"; }, 2000);
    });
  }
})();
