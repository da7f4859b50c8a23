// The page's one script. The page works without it (links and forms); with it, it is live, and navigates in place.
//   theme -> ages -> morph -> loading -> live -> navigation -> keyboard -> administration
"use strict";
(() => {
  const POLL_MS = 3000, TIMEOUT_MS = 8000, TYPING_MS = 180;
  const root = document.documentElement;
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

  // --- theme: set before the first paint; this script stands in the head for that ---
  const THEMES = ["", "light", "dark"];
  const NAMES = { "": "as the system", light: "light", dark: "dark" };
  const stored = () => { try { return localStorage.getItem("theme") || ""; } catch { return ""; } };

  function setTheme(theme) {
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    const button = $("#theme");
    if (button) button.title = `Colours: ${NAMES[theme]}`;
  }

  function nextTheme() {
    const theme = THEMES[(THEMES.indexOf(stored()) + 1) % THEMES.length];
    try { localStorage.setItem("theme", theme); } catch { /* private window: for this page only */ }
    setTheme(theme);
  }

  root.classList.add("scripted");
  setTheme(stored());

  // --- ages: counted on every second, by the server's clock ---
  let offset = 0;       // server's clock minus ours, in seconds
  const now = () => Date.now() / 1000 + offset;
  const UNITS = [["d", 86400, 172800], ["h", 3600, 7200], ["min", 60, 60]];      // as format_duration in server.py

  function duration(seconds) {
    for (const [unit, size, from] of UNITS) if (seconds >= from) return `${Math.floor(seconds / size)} ${unit}`;
    return `${Math.max(0, Math.floor(seconds))} s`;
  }

  function age(at) { return at > now() + 1 ? `in ${duration(at - now())}` : duration(now() - at); }

  function clock(at) {
    return new Date(at * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  }

  function writeAges(within = document) {
    for (const time of $$("time[data-unix]", within)) {
      const at = Number(time.dataset.unix);
      const text = time.dataset.form === "clock" ? clock(at) : age(at) + (at > now() + 1 ? "" : time.dataset.suffix || "");
      if (time.textContent !== text) time.textContent = text;
      if (!time.dataset.told) { time.title = clock(at); time.dataset.told = "1"; }
    }
  }

  // --- morph: the new page is put into the old one node by node, so focus, scroll, selection and typing stay ---
  const keyOf = (node) => node.nodeType === 1 ? node.id || node.dataset.key || "" : "";
  const alike = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName && keyOf(a) === keyOf(b);

  function morph(old, fresh) {
    if (old.nodeType === 3) { if (old.data !== fresh.data) old.data = fresh.data; return; }
    if (old.nodeType !== 1 || "keep" in old.dataset) return;
    if (old.nodeName === "TIME" && old.dataset.unix === fresh.dataset.unix) return;
    morphAttributes(old, fresh);
    morphChildren(old, fresh);
  }

  function morphAttributes(old, fresh) {
    for (const { name } of [...old.attributes]) {
      const own = name === "open" || name === "data-open" || (name === "class" && old.id === "main");      // what the reader opened stays open
      if (!own && !fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }

  function morphChildren(old, fresh) {
    const keyed = new Map();
    for (const child of old.children) if (keyOf(child)) keyed.set(keyOf(child), child);
    let here = old.firstChild;
    for (const wanted of [...fresh.childNodes]) {
      const key = keyOf(wanted);
      const moved = key && keyed.get(key);
      if (moved && moved !== here && moved.nodeName === wanted.nodeName) old.insertBefore(moved, here);
      else if (!here || !alike(here, wanted)) { old.insertBefore(document.importNode(wanted, true), here); continue; }
      const current = moved && moved.nodeName === wanted.nodeName ? moved : here;
      here = current.nextSibling;
      morph(current, wanted);
    }
    while (here) { const next = here.nextSibling; here.remove(); here = next; }
  }

  // --- loading: a fragment of the page as it is at an address ---
  let etag = "", etagOf = "", asked = 0, lastGood = Date.now() / 1000;

  async function load(address, { force = false } = {}) {
    const ticket = ++asked;
    const headers = { "X-Fragment": "main" };
    if (!force && etag && etagOf === address) headers["If-None-Match"] = etag;
    let answer, text = "";
    try {
      answer = await fetch(address, { headers, cache: "no-store", credentials: "same-origin", signal: AbortSignal.timeout(TIMEOUT_MS) });
      if (answer.status === 200) text = await answer.text();
    } catch { return lost(); }
    if (ticket !== asked) return;             // a later request has been made meanwhile
    if (answer.status === 401 || answer.status === 403 || (answer.redirected && new URL(answer.url).pathname === "/login")) return signedOut();
    if (answer.status !== 200 && answer.status !== 304) return lost();
    const date = Date.parse(answer.headers.get("Date") || "");
    if (date && Math.abs(date / 1000 - now()) > 2) offset = date / 1000 + 0.5 - Date.now() / 1000;
    if (answer.status === 200) { etag = answer.headers.get("ETag") || ""; etagOf = address; show(text); }
    found();
  }

  function show(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("main");
    if (!fresh) return lost();
    const was = $("#drawer");
    const before = was && was.dataset.host;
    morph($("#main"), fresh);
    writeAges($("#main"));
    settle(before);
  }

  function settle(before) {
    document.title = $("#main").dataset.title || "proxmon";
    const drawer = $("#drawer");
    root.classList.toggle("has-drawer", Boolean(drawer));
    if (drawer && drawer.dataset.host !== before) { drawer.scrollTop = 0; $("#drawer-title").focus({ preventScroll: true }); }
    if (drawer && drawer.dataset.host !== before) goToPool(drawer);
    if (!drawer && before) {
      const row = $$(".row-link").find((link) => new URL(link.href).searchParams.get("host") === before);
      if (row && document.activeElement === document.body) row.focus({ preventScroll: true });
    }
  }

  function goToPool(drawer) {
    const target = drawer.dataset.pool ? `pool-${drawer.dataset.pool}` : location.hash.slice(1);
    const place = target && document.getElementById(target);
    if (!place) return;
    if (place.classList.contains("pool")) place.classList.add("chosen");
    drawer.scrollTop += place.getBoundingClientRect().top - $(".drawer-head", drawer).getBoundingClientRect().bottom - 7;
  }

  // --- live: poll while the page is seen, and say so when the data stands still ---
  let timer = 0;

  function say(text, how) {
    const live = $("#live");
    if (!live) return;
    $(".live-text", live).textContent = text;
    live.classList.toggle("live-lost", how === "lost");
    live.classList.toggle("live-paused", how === "paused");
  }

  function banner(text, link) {
    const place = $("#frozen");
    if (!place || place.dataset.text === text) return;
    place.dataset.text = text;
    place.textContent = text;
    if (link) {
      const anchor = document.createElement("a");
      anchor.href = link[0];
      anchor.textContent = link[1];
      place.append(" ", anchor);
    }
    place.hidden = !text;
  }

  function lost() {
    root.classList.add("is-frozen");
    const since = new Date(lastGood * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    banner(`Connection lost – data frozen since ${since}`);
    say("Lost", "lost");
  }

  function signedOut() {
    root.classList.add("is-frozen");
    banner("You are signed out; this is no longer up to date.", ["/login", "Log in"]);
    say("Signed out", "lost");
  }

  function found() {
    lastGood = Date.now() / 1000;
    root.classList.remove("is-frozen");
    banner("");
    say("Live", "");
  }

  const here = () => location.pathname + location.search;

  async function beat() {
    clearTimeout(timer);
    if (document.hidden) { say("Paused", "paused"); return; }
    await load(here());
    clearTimeout(timer);
    timer = setTimeout(beat, POLL_MS);
  }

  // --- navigation: links and the search box change the page in place ---
  const ours = (url) => url.origin === location.origin && (url.pathname === "/" || url.pathname === "/admin/hosts");

  function go(address, { replace = false } = {}) {
    history[replace ? "replaceState" : "pushState"](null, "", address);
    showSearch();
    return load(here(), { force: true }).then(showTab);
  }

  function showTab() {
    const tab = $(".tab[aria-current]");
    if (tab) tab.parentNode.scrollLeft = tab.offsetLeft - 60;       // the narrow page's row of tabs is wider than it
  }

  function followLink(event) {
    const link = event.target.closest("a[href]");
    if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    const url = new URL(link.href);
    if (!ours(url) || link.target || link.classList.contains("skip")) return;
    event.preventDefault();
    const same = url.pathname + url.search === here();
    if (same) { history.replaceState(null, "", url); const drawer = $("#drawer"); if (drawer) goToPool(drawer); return; }
    const turned = url.searchParams.get("offset") !== new URLSearchParams(location.search).get("offset");
    go(url.href).then(() => { if (turned) scrollTo({ top: 0 }); });
  }

  function showSearch() {
    const parameters = new URLSearchParams(location.search);
    const box = $("#search");
    if (!box) return;
    if (document.activeElement !== box) box.value = parameters.get("q") || "";
    box.form.elements.tab.value = parameters.get("tab") || "hosts";
  }

  let typing = 0;
  function search(replace) {
    clearTimeout(typing);
    const parameters = new URLSearchParams(location.pathname === "/" ? location.search : "");
    const text = $("#search").value.trim();
    if (text === (parameters.get("q") || "") && location.pathname === "/") return;
    for (const name of ["offset", "host", "pool"]) parameters.delete(name);
    if (text) parameters.set("q", text); else parameters.delete("q");
    go("/" + (parameters.size ? `?${parameters}` : ""), { replace });
  }

  // --- keyboard: / search, j k arrows move, Enter opens, Escape closes ---
  function onKey(event) {
    const inField = event.target.closest && event.target.closest("input, select, textarea, dialog");
    if (event.key === "Escape" && !$("dialog[open]")) return onEscape(event);
    if (inField || event.metaKey || event.ctrlKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); $("#search").focus(); $("#search").select(); }
    const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
    const arrow = event.key.startsWith("Arrow");
    if (step && (!arrow || event.target.closest(".row"))) { event.preventDefault(); moveRow(step); }
  }

  function onEscape(event) {
    const close = $(".drawer-close");
    if (event.target === $("#search")) {
      if (event.target.value) { event.target.value = ""; search(true); event.preventDefault(); } else event.target.blur();
    } else if (close) { event.preventDefault(); close.click(); }
  }

  function moveRow(step) {
    const links = $$(".lists .row-link");
    const at = links.indexOf(document.activeElement);
    const next = links[at < 0 ? (step > 0 ? 0 : links.length - 1) : Math.min(links.length - 1, Math.max(0, at + step))];
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
  }

  // --- administration: writes go to the JSON API with the page's CSRF token ---
  const apiOf = (name, rest = "") => `/api/v1/hosts/${encodeURIComponent(name)}${rest}`;

  async function write(method, address, body) {
    const headers = { "X-CSRF-Token": $('meta[name="csrf-token"]').content, Accept: "application/json" };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(address, { method, headers, credentials: "same-origin", body: body === undefined ? undefined : JSON.stringify(body) });
    } catch { throw new Error("The server does not answer. Nothing was changed, as far as this page can tell."); }
    const text = await answer.text();
    let value = {};
    try { value = text ? JSON.parse(text) : {}; } catch { /* no JSON: the status tells */ }
    if (!answer.ok) throw new Error(value.detail || value.title || `The server refused (${answer.status}).`);
    return value;
  }

  // Run a write with its button off, its error beside the form, and the page brought up to date after it.
  async function doing(form, work) {
    const error = form ? $(".form-error", form) : $("#admin-error");
    const buttons = form ? $$("button", form) : [];
    error.textContent = "";
    for (const button of buttons) button.disabled = true;
    try {
      await work();
    } catch (problem) {
      error.textContent = problem.message;
    } finally {
      for (const button of buttons) button.disabled = false;
    }
    load(here(), { force: true });
  }

  const tagsOf = (text) => text.split(/[\s,;]+/).filter(Boolean);

  function register(form) {
    const { name, site, tags } = form.elements;
    return doing(form, async () => {
      const body = { name: name.value.trim() };
      if (site.value.trim()) body.site = site.value.trim();
      if (tagsOf(tags.value).length) body.tags = tagsOf(tags.value);
      const made = await write("POST", "/api/v1/hosts", body);
      form.reset();
      showToken(made);
    });
  }

  function showToken({ host, token, install }) {
    const panel = $("#token");
    const texts = { name: host.name, token, install: install.join("\n") };
    for (const [name, text] of Object.entries(texts)) $(`[data-fill="${name}"]`, panel).textContent = text;
    panel.hidden = false;
    panel.scrollIntoView({ block: "nearest" });
  }

  function dismissToken() {
    const panel = $("#token");
    for (const place of $$("[data-fill]", panel)) place.textContent = "";
    panel.hidden = true;
  }

  async function copy(button) {
    const text = $(`[data-fill="${button.dataset.copy}"]`).textContent;
    const label = button.textContent;
    button.textContent = await toClipboard(text) ? "Copied" : "Select it and copy by hand";
    setTimeout(() => { button.textContent = label; }, 1600);
  }

  async function toClipboard(text) {
    try { await navigator.clipboard.writeText(text); return true; } catch { /* plain http: the old way */ }
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }

  function openEdit(button) {
    const form = $("[data-edit]", button.closest(".host-line"));
    if ("open" in form.dataset) delete form.dataset.open; else { form.dataset.open = ""; form.elements.name.focus(); }
  }

  function edit(form) {
    const old = form.dataset.edit;
    const changes = {};
    for (const field of ["name", "site", "note"]) {
      const input = form.elements[field];
      if (input.value.trim() !== input.defaultValue) changes[field] = input.value.trim() || null;
    }
    if (form.elements.tags.value !== form.elements.tags.defaultValue) changes.tags = tagsOf(form.elements.tags.value);
    const rest = form.elements.maintenance.value;
    if (rest) changes.maintenance_until = rest === "0" ? null : Math.round(now()) + Number(rest);
    return doing(form, async () => {
      if (Object.keys(changes).length) await write("PATCH", apiOf(old), changes);
      delete form.dataset.open;
      form.elements.maintenance.value = "";
    });
  }

  function ask(title, text, yes) {
    const dialog = $("#dialog");
    $("#dialog-title").textContent = title;
    $("#dialog-text").textContent = text;
    $("#dialog-yes").textContent = yes;
    dialog.returnValue = "no";
    dialog.showModal();
    return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true }));
  }

  async function rotate(button) {
    const name = button.dataset.rotate;
    if (!await ask(`Rotate the token of ${name}?`, "The old token is refused from then on: the agent waits, keeping its reports, until it has the new one.", "Rotate token")) return;
    await doing(null, async () => {
      const made = await write("POST", apiOf(name, "/rotate-token"), {});
      showToken(made);
    });
  }

  async function remove(button) {
    const name = button.dataset.remove;
    if (!await ask(`Remove ${name}?`, "Its token is refused at once, and its state, alerts and history leave this page.", `Remove ${name}`)) return;
    await doing(null, () => write("DELETE", apiOf(name)));
  }

  function onClick(event) {
    const on = (selector) => event.target.closest(selector);
    let button;
    if (on("#theme")) nextTheme();
    else if ((button = on("[data-copy]"))) copy(button);
    else if (on("[data-dismiss]")) dismissToken();
    else if ((button = on("[data-open-edit]"))) openEdit(button);
    else if ((button = on("[data-rotate]"))) rotate(button);
    else if ((button = on("[data-remove]"))) remove(button);
    else followLink(event);
  }

  function onSubmit(event) {
    const form = event.target;
    if (form.matches(".search")) { event.preventDefault(); search(false); }
    if (form.matches("[data-register]")) { event.preventDefault(); register(form); }
    if (form.matches("[data-edit]")) { event.preventDefault(); edit(form); }
  }

  function start() {
    setTheme(stored());
    writeAges();
    document.addEventListener("click", onClick);
    document.addEventListener("submit", onSubmit);
    if (!$("#main")) return;                       // the log-in page has no more than this
    setInterval(writeAges, 1000);
    settle("");
    showTab();
    document.addEventListener("keydown", onKey);
    document.addEventListener("visibilitychange", beat);
    addEventListener("popstate", () => { showSearch(); load(here(), { force: true }); });
    $("#search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => search(true), TYPING_MS); });
    timer = setTimeout(beat, POLL_MS);
  }

  document.addEventListener("DOMContentLoaded", start);
})();
