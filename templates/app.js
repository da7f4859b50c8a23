// The page's one script. The page works without it (links and forms); with it, it is live, and navigates in place.
//   theme -> formats -> ages -> morph -> loading -> live -> night -> navigation -> columns -> keyboard -> administration -> cards -> charts
//     -> problems -> acting -> onboarding -> alerting
"use strict";
(() => {
  const POLL_MS = 3000, REFRESH_MS = 10000, TIMEOUT_MS = 8000, TYPING_MS = 180;
  const root = document.documentElement;
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

  // --- theme: set before the first paint; this script stands in the head for that ---
  const THEMES = ["", "light", "dark"];
  const NAMES = { "": "follow the system", light: "light", dark: "dark" };
  const kept = (name) => { try { return localStorage.getItem(name) || ""; } catch { return ""; } };
  const keep = (name, value) => { try { localStorage.setItem(name, value); } catch { /* private window: for this page only */ } };

  function setTheme(theme) {
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    const button = $("#theme");
    if (button) button.title = `Colours: ${NAMES[theme]}`;
  }

  function nextTheme() {
    const theme = THEMES[(THEMES.indexOf(kept("theme")) + 1) % THEMES.length];
    keep("theme", theme);
    setTheme(theme);
  }

  root.classList.add("scripted");
  setTheme(kept("theme"));

  // --- formats: numbers and units, letter for letter as server.py writes them ---
  const UNITS = [["d", 86400, 172800], ["h", 3600, 7200], ["min", 60, 60]];

  function showDuration(seconds) {
    for (const [unit, size, from] of UNITS) if (seconds >= from) return `${Math.floor(seconds / size)} ${unit}`;
    return `${Math.max(0, Math.floor(seconds))} s`;
  }

  // As Python rounds: what is halfway goes to the even digit.
  function fixed(value, digits = 0) {
    const scaled = value * 10 ** digits, floor = Math.floor(scaled);
    return (scaled - floor === 0.5 ? (floor + floor % 2) / 10 ** digits : value).toFixed(digits);
  }

  function showNumber(value, digits = 0) { return fixed(value, digits).replace(/\B(?=(\d{3})+(?!\d))(?<!\.\d*)/g, ","); }

  function showBytes(size) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    while (Math.abs(size) >= 1023.5 && units.length > 1) { size /= 1024; units.shift(); }
    return `${fixed(size, units[0] === "B" || Math.abs(size) >= 99.95 ? 0 : 1)} ${units[0]}`;
  }

  function showRatio(ratio) {
    const percent = ratio * 100;
    return percent > 0 && percent < 0.5 ? "<1%" : `${fixed(percent, percent >= 99 && percent < 99.95 ? 1 : 0)}%`;
  }

  function countOf(count, word) { return `${showNumber(count)} ${word}${count === 1 ? "" : "s"}`; }

  // --- ages: counted on every second, by the server's clock ---
  let offset = 0;       // server's clock minus ours, in seconds
  const now = () => Date.now() / 1000 + offset;
  function age(at) { return at > now() + 1 ? `in ${showDuration(at - now())}` : showDuration(now() - at); }

  function clock(at) {
    return new Date(at * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  }

  function writeAges(within = document) {
    for (const shown of $$("[data-now]", within)) shown.textContent = new Date(now() * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
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
    if (fresh.nodeType === 1 && "same" in fresh.dataset) return;             // the server says: as you have it
    if (old.nodeType === 3) { if (old.data !== fresh.data) old.data = fresh.data; return; }
    if (old.nodeType !== 1 || "keep" in old.dataset) return;
    if (old.nodeName === "TIME" && old.dataset.unix === fresh.dataset.unix) return;
    morphAttributes(old, fresh);
    morphChildren(old, fresh);
  }

  function morphAttributes(old, fresh) {
    for (const { name } of [...old.attributes]) {
      const own = name === "open" || name === "inert" || name === "data-open" || (name === "class" && old.id === "main");      // what the reader opened stays open
      if (!own && !fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }

  // Rows stand still while the pointer or the focus is among them: new values come in, another order waits.
  let placed = "";       // the address whose rows stand as the server orders them

  function hold(old, fresh) {
    if (!old.matches("tbody, .problem-list") || placed !== here() || !((old.closest("table") || old).matches(":hover") || old.contains(document.activeElement))) return;
    const place = new Map([...old.children].map((row, number) => [keyOf(row), number]));
    const known = (row) => place.get(keyOf(row)) ?? place.size;
    const rows = [...fresh.children], held = [...rows].sort((a, b) => known(a) - known(b));
    if (held.every((row, number) => row === rows[number])) return;
    fresh.append(...held);
    orderWaits(true);
  }

  function orderWaits(waits) {
    const button = $("#reorder");
    if (button) button.hidden = !waits;
  }

  function morphChildren(old, fresh) {
    hold(old, fresh);
    const keyed = new Map();
    for (const child of old.children) if (keyOf(child)) keyed.set(keyOf(child), child);
    let here = old.firstChild;
    for (const wanted of [...fresh.childNodes]) {
      const key = keyOf(wanted);
      const moved = key && keyed.get(key);
      if (key && "same" in wanted.dataset && !moved) { etag = ""; continue; }      // it is not here after all: all of it next time
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
    const headers = { "X-Fragment": "main", ...(etag ? { "X-Base": etag } : {}) };
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
    loadedAt = Date.now();
    if (answer.status === 200) {
      etag = answer.headers.get("ETag") || "";
      etagOf = address;
      if (force) placed = "";
      show(text);
    }
    found();
  }

  function show(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("main");
    if (!fresh) return lost();
    const was = $("#drawer"), next = $("#drawer", fresh);
    const before = was && was.dataset.card;
    if (was && next && next.dataset.card !== before) was.remove();      // another card: nothing of this one stays
    orderWaits(false);
    morph($("#main"), fresh);
    placed = here();
    writeAges($("#main"));
    settle(before);
  }

  function settle(before) {
    document.title = $("#main").dataset.title || "proxmon";
    settleCard(before);
  }

  // --- live: poll while the page is seen, and say so when the data stands still ---
  let timer = 0, news = "", loadedAt = 0;

  function say(text, how) {
    const live = $("#live");
    if (!live) return;
    $(".live-text", live).textContent = text;
    live.classList.toggle("live-lost", how === "lost");
    live.classList.toggle("live-paused", how === "paused");
  }

  // In the top layer, above an open card or dialog; the page under it stays opaque, and what is open can be closed.
  function banner(text, link) {
    const place = $("#frozen");
    if (!place || place.dataset.text === text) return;
    place.dataset.text = text;
    place.textContent = text;
    if (link) place.append(" ", node("a", { href: link[0] }, link[1]));
    if (place.matches(":popover-open")) place.hidePopover();       // shown again it is above what has been opened since
    if (text) place.showPopover();
  }

  function lost() {
    root.classList.add("is-frozen");
    const since = new Date(lastGood * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    banner(`Connection lost – data frozen since ${since}`);
    say("Lost", "lost");
  }

  function signedOut() {
    root.classList.add("is-frozen");
    for (const dialog of $$("dialog[open]")) dialog.close();       // a modal one would keep the link from being clicked
    if (wall()) return banner("This link is not valid any more; what is shown is no longer up to date.");
    banner("You are signed out; this is no longer up to date.", [`/login?next=${encodeURIComponent(here() + location.hash)}`, "Log in"]);
    say("Signed out", "lost");
  }

  // A wall display that nobody reloads: after an outage the server may be a newer one.
  const wall = () => document.body.classList.contains("kiosk");

  function found() {
    if (wall() && root.classList.contains("is-frozen")) return location.reload();
    lastGood = Date.now() / 1000;
    root.classList.remove("is-frozen");
    banner("");
    say("Live", "");
  }

  const here = () => location.pathname + location.search;

  async function beat() {
    clearTimeout(timer);
    if (document.hidden) { say("Paused", "paused"); return; }
    const overview = wall() ? "" : await glance();      // half a kB; the page itself when that is news, else every 10 s
    if (overview === null) lost();
    else if (!overview || overview !== news || Date.now() - loadedAt >= REFRESH_MS) { await load(here()); news = overview; } else found();
    clearTimeout(timer);
    timer = setTimeout(beat, wall() ? REFRESH_MS : POLL_MS);
  }

  // The overview as one text; "" if the server answers something else, null if it does not answer.
  async function glance() {
    try {
      const answer = await fetch("/api/v1/overview", { credentials: "same-origin", signal: AbortSignal.timeout(TIMEOUT_MS) });
      if (!answer.ok) return "";
      const { hosts, problems, last_notification_at: told } = await answer.json();
      return JSON.stringify([hosts, problems, told]);
    } catch { return null; }
  }

  // --- night: the timeline by the reader's own clock ---
  // Last night: from eight in the evening to eight in the morning.
  function lastNight(link) {
    const url = new URL(link.href), morning = new Date(now() * 1000).setHours(8, 0, 0, 0) / 1000;
    url.searchParams.set("since", morning - 43200);
    url.searchParams.set("until", morning);
    link.href = url.href;
  }

  // --- navigation: links and the search box change the page in place ---
  const ours = (url) => url.origin === location.origin && (url.pathname === "/" || url.pathname === "/admin/hosts");

  function go(address, { replace = false } = {}) {
    history[replace ? "replaceState" : "pushState"](null, "", withColumns(address));
    showSearch();
    return load(here(), { force: true }).then(showTab).then(goToPlace);
  }

  function goToPlace() {
    const place = location.hash === "#delivery" && document.getElementById("delivery");
    if (place) place.scrollIntoView({ block: "center" });
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
    if (root.classList.contains("is-frozen") && link.matches(".drawer-close, .scrim")) return closeAlone(url);
    const same = url.pathname + url.search === here();
    if (same) { history.replaceState(null, "", url); goToSection(); goToPlace(); return; }
    rememberOpener(link);
    const turned = url.searchParams.get("offset") !== new URLSearchParams(location.search).get("offset");
    go(url.href).then(() => { if (turned) scrollTo({ top: 0 }); });
  }

  // A card closes without the server, too.
  function closeAlone(url) {
    history.pushState(null, "", url);
    for (const part of $$("#drawer, .scrim")) part.remove();
    settle("");
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
    for (const name of ["offset", "host", "guest", "pool", "disk", "storage", "cluster"]) parameters.delete(name);
    if (text) parameters.set("q", text); else parameters.delete("q");
    go("/" + (parameters.size ? `?${parameters}` : ""), { replace });
  }

  // --- columns: of a list, in the address; this browser remembers the last choice for each list ---
  function withColumns(address) {
    const url = new URL(address, location), asked = url.searchParams;
    const cols = kept(`columns-${asked.get("tab") || "hosts"}`);
    if (url.pathname === "/" && cols && !asked.has("cols") && (asked.has("tab") || !asked.has("q"))) asked.set("cols", cols);
    return url.href;
  }

  function chooseColumns(form) {
    const url = new URL(location), cols = $$("input:checked", form).map((box) => box.value).join(",");
    keep(`columns-${form.dataset.columns}`, cols);
    url.searchParams.set("tab", form.dataset.columns);
    url.searchParams.set("cols", cols);
    return go(url.href);
  }

  function closeColumns(event) {
    for (const open of $$(".columns[open]")) if (!event || !open.contains(event.target)) open.open = false;
  }

  // --- keyboard: / search, j k arrows move, Enter opens, a acknowledges, Escape closes ---
  function onKey(event) {
    const inField = event.target.closest && event.target.closest("input, select, textarea, dialog");
    if (event.key === "Escape" && !$("dialog[open]")) return onEscape(event);
    if (inField || event.metaKey || event.ctrlKey || event.altKey) return;
    if (event.key === "?") { event.preventDefault(); $("#words").showModal(); }
    if (event.key === "/") { event.preventDefault(); $("#search").focus(); $("#search").select(); }
    const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
    const arrow = event.key.startsWith("Arrow"), seen = event.key === "a" && $("[data-act=acknowledge]", event.target.closest(".problem") || $("#undo"));
    if (seen) { event.preventDefault(); openAct(seen); }
    if (step && (!arrow || event.target.closest(".row"))) { event.preventDefault(); moveRow(step); }
  }

  function onEscape(event) {
    const close = $(".drawer-close"), columns = $(".columns[open]");
    if (columns) { closeColumns(); $("summary", columns).focus(); } else if (event.target === $("#search")) {
      if (event.target.value) { event.target.value = ""; search(true); event.preventDefault(); } else event.target.blur();
    } else if (close) { event.preventDefault(); close.click(); }
  }

  function moveRow(step) {
    const links = $$(".problem .problem-line, .lists .row-link").filter((link) => link.offsetParent);
    const at = links.indexOf(document.activeElement);
    const next = links[at < 0 ? (step > 0 ? 0 : links.length - 1) : Math.min(links.length - 1, Math.max(0, at + step))];
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
  }

  // --- administration: writes go to the JSON API with the page's CSRF token ---
  const apiOf = (name, rest = "") => `/api/v1/hosts/${encodeURIComponent(name)}${rest}`;

  function refuseIfLost() {
    if (root.classList.contains("is-frozen")) throw new Error("There is no connection to the server, so nothing was changed.");
  }

  async function write(method, address, body) {
    const headers = { "X-CSRF-Token": $('meta[name="csrf-token"]').content, Accept: "application/json" };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    refuseIfLost();
    let answer, text;
    try {
      answer = await fetch(address, { method, headers, credentials: "same-origin", signal: AbortSignal.timeout(TIMEOUT_MS), body: body === undefined ? undefined : JSON.stringify(body) });
      text = await answer.text();
    } catch { throw new Error(`The server has not answered within ${TIMEOUT_MS / 1000} s. Nothing was changed, as far as this page can tell.`); }
    let value = {};
    try { value = text ? JSON.parse(text) : {}; } catch { /* no JSON: the status tells */ }
    if (!answer.ok) throw Object.assign(new Error(value.detail || value.title || `The server refused (${answer.status}).`), { told: value });
    return value;
  }

  // Run a write with its button off, its error beside the form, and the page brought up to date after it.
  async function doing(form, work) {
    const error = form ? $(".form-error", form) : $("#admin-error") || $("#page-error");
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

  async function copy(button) {
    const text = $(`[data-fill="${button.dataset.copy}"]`).textContent;
    const label = button.textContent;
    button.textContent = await toClipboard(text) ? "Copied" : "Select it and copy by hand";
    setTimeout(() => { button.textContent = label; }, 1600);
  }

  async function copyText(button) {
    button.textContent = await toClipboard(button.dataset.copyText) ? "Copied" : "Select it and copy by hand";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  }

  async function copyLink(button) {
    button.textContent = await toClipboard(location.href) ? "Copied" : "Copy it from the address bar";
    setTimeout(() => { button.textContent = "Copy link"; }, 1600);
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
    if (!await ask(`Remove ${name}?`, "Its token is refused at once; its state, alerts and history are deleted, and cannot be brought back.", `Remove ${name}`)) return;
    await doing(null, () => write("DELETE", apiOf(name)));
  }

  // A button with data-call="METHOD /path", asked about first if it has a data-title; a form whose fields are the body.
  async function callApi(button) {
    const { title, text, yes } = button.dataset;
    if (title && !await ask(title, text, yes)) return;
    const [method, path] = button.dataset.call.split(" ");
    await doing(null, () => write(method, path));
  }

  function sendForm(form) {
    const [method, path] = form.dataset.send.split(" ");
    return doing(form, async () => {
      const made = await write(method, path, Object.fromEntries(new FormData(form)));
      form.reset();
      const shown = $("[data-made]", form);
      if (shown) { shown.textContent = made.link; shown.parentElement.hidden = false; }
    });
  }

  // --- cards: the dialog of one host, guest, pool, disk, storage or cluster ---
  let opener = "";       // the link that opened the first card: where the focus goes back to

  const markOf = (link) => `${link.className} ${link.pathname}${link.search}`;

  function rememberOpener(link) { if (!$("#drawer")) opener = markOf(link); }

  function settleCard(before) {
    const drawer = $("#drawer");
    root.classList.toggle("has-drawer", Boolean(drawer));
    keepOut(drawer);
    if (drawer && drawer.dataset.card !== before) {
      drawer.scrollTop = 0;
      $("#drawer-title").focus({ preventScroll: true });
      goToSection();
    }
    if (drawer && !$("[data-charts][data-shown]")) firstCharts();
    if (!drawer && before) focusBack(before);
  }

  // While a card is open nothing else can be reached, neither by keyboard nor by a screen reader.
  function keepOut(drawer) {
    const others = [...$$("body > :not(main, script, dialog, #frozen, #undo, #page-error, .symbols)"), ...$("#main").children];
    for (const other of others) if (other !== drawer && !other.classList.contains("scrim")) other.inert = Boolean(drawer);
  }

  function focusBack(before) {
    const links = $$("#main a[href]"), host = before.split("/")[0];
    const link = links.find((a) => markOf(a) === opener) || links.find((a) => new URL(a.href).searchParams.get("host") === host);
    opener = "";
    if (document.activeElement === document.body) (link || $("#main")).focus({ preventScroll: true });
  }

  function goToSection() {
    const drawer = $("#drawer"), place = drawer && location.hash && document.getElementById(location.hash.slice(1));
    if (!place || !drawer.contains(place)) return;
    if (place.nodeName === "DETAILS") place.open = true;
    for (const other of $$(".chosen", drawer)) other.classList.remove("chosen");
    place.classList.add("chosen");
    drawer.scrollTop += place.getBoundingClientRect().top - $(".drawer-head", drawer).getBoundingClientRect().bottom - 7;
  }

  // --- charts: the history API as SVG; average line, band from minimum to maximum, gaps as gaps, marks below ---
  const SVG = "http://www.w3.org/2000/svg";
  const CHART_HEIGHT = 112, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 30;
  const CHARTS = {       // section -> [title, unit, fields with their names in the read-out]
    node: [["CPU", "ratio", { cpu_ratio: "in use", iowait_ratio: "waiting for IO" }],
      ["Memory", "bytes", { "~used": "used", "~arc": "ZFS cache", "~free": "free" }, "stacked"], ["Swap", "bytes", { swap_used_bytes: "used", swap_total_bytes: "size" }],
      ["Pressure", "ratio", { pressure_io_full_avg10_ratio: "IO", pressure_memory_full_avg10_ratio: "memory", pressure_cpu_some_avg10_ratio: "CPU" }],
      ["Load", "number", { load1: "1 min" }], ["Network", "bytes/s", { net_receive_bytes_total: "in", net_transmit_bytes_total: "out" }],
      ["Disk IO", "bytes/s", { "~read": "read", "~written": "written" }], ["Busiest disk", "ratio", { "~busy": "busy" }], ["Hottest sensor", "celsius", { "~hottest": "now" }],
      ["Root disk", "bytes", { root_used_bytes: "used", root_total_bytes: "size" }], ["Pools", "ratio", { "~pools": "" }]],
    pools: [["Used", "ratio", { capacity_ratio: "used" }], ["Fragmentation", "ratio", { fragmentation_ratio: "of free space" }],
      ["Errors", "number", { read_errors: "read", checksum_errors: "checksum" }], ["Scrub or resilver", "ratio", { scan_progress_ratio: "done" }]],
    guests: [["CPU", "ratio", { cpu_ratio: "in use" }], ["Memory", "bytes", { memory_used_bytes: "used", memory_max_bytes: "most" }],
      ["Network", "bytes/s", { net_receive_bytes_total: "in", net_transmit_bytes_total: "out" }], ["Disk", "bytes/s", { disk_read_bytes_total: "read", disk_write_bytes_total: "written" }]],
    storages: [["Space", "bytes", { used_bytes: "used", total_bytes: "size" }]],
    disks: [["Temperature", "celsius", { temperature_celsius: "now" }], ["Wear", "ratio", { wear_ratio: "used up" }], ["Reallocated sectors", "number", { reallocated_sectors: "sectors" }]],
  };
  const SPANS = { "1h": 3600, "6h": 21600, "24h": 86400, "7d": 604800, "30d": 2592000, "1y": 31557600 };
  const inAddress = () => new URLSearchParams(location.search);
  let range = SPANS[inAddress().get("range")] || 86400, chartsAsked = 0, chartsTimer = 0;

  function node(name, attributes = {}, ...children) {
    const made = name === "svg" || SVG_NAMES.has(name) ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  const SVG_NAMES = new Set(["g", "path", "line", "text", "title", "circle", "rect"]);

  const UNIT_TEXT = {
    ratio: showRatio,
    bytes: showBytes,
    "bytes/s": (value) => `${showBytes(value)}/s`,
    celsius: (value) => `${showNumber(value)} °C`,
    number: (value) => showNumber(value, value >= 100 || Number.isInteger(value) ? 0 : 2),
  };

  function axisText(value, unit) {
    if (unit === "ratio") return `${+(value * 100).toFixed(1)}%`;
    if (!unit.startsWith("bytes")) return `${+value.toFixed(2)}`;
    const power = value ? Math.min(5, Math.floor(Math.log(value) / Math.log(1000))) : 0;
    return `${+(value / 1024 ** power).toPrecision(3)}${["", " K", " M", " G", " T", " P"][power]}`;
  }

  function niceTop(most, unit) {
    if (unit === "ratio") return [0.1, 0.2, 0.5, 1].find((top) => most <= top) || Math.ceil(most * 2) / 2;
    if (!(most > 0)) return 1;
    const base = unit.startsWith("bytes") ? 1024 ** Math.max(0, Math.floor(Math.log(most) / Math.log(1024))) : 1;
    const power = 10 ** Math.floor(Math.log10(most / base));
    return base * power * [1, 2, 4, 6, 8, 10].find((one) => most / base / power <= one);
  }

  // Stretches without a gap: a gap is a step without a point, or, as received, a much longer wait than usual.
  function stretches(points, step) {
    const waits = points.slice(1).map((point, n) => point[0] - points[n][0]).sort((a, b) => a - b);
    const usual = waits.length ? waits[waits.length >> 1] : step;
    const most = Math.max(step > 30 ? step * 1.01 : 75, usual * 2.2);
    const found = [];
    points.forEach((point, n) => {
      if (!n || point[0] - points[n - 1][0] > most) found.push([]);
      found[found.length - 1].push(point);
    });
    return found;
  }

  function timeText(at) {
    const date = new Date(at * 1000);
    return range <= 86400 ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" })
      : date.toLocaleDateString([], { day: "numeric", month: "short", ...(range > 2e7 ? { year: "2-digit" } : {}) });
  }

  function drawAxes(svg, view, unit) {
    for (const part of [0, 0.5, 1]) {
      const y = view.y(view.top * part);
      svg.append(node("line", { class: "grid", x1: LEFT, x2: view.width - RIGHT, y1: y, y2: y }));
      svg.append(node("text", { class: "axis", x: LEFT - 6, y: y + 3.5, "text-anchor": "end" }, axisText(view.top * part, unit)));
    }
    const wanted = Math.max(2, Math.floor((view.width - LEFT) / 58));
    const sizes = [600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 345600, 604800, 1209600, 2629800, 5259600, 7889400];
    const size = sizes.find((one) => (view.to - view.from) / one <= wanted) || 7889400;
    const zone = new Date(view.to * 1000).getTimezoneOffset() * 60;
    for (let at = Math.ceil((view.from - zone) / size) * size + zone; at <= view.to; at += size) {
      const x = view.x(at);
      svg.append(node("line", { class: "tick", x1: x, x2: x, y1: CHART_HEIGHT - BOTTOM, y2: CHART_HEIGHT - BOTTOM + 3 }));
      if (x > LEFT + 14 && x < view.width - 20) svg.append(node("text", { class: "axis", x, y: CHART_HEIGHT - 3, "text-anchor": "middle" }, timeText(at)));
    }
  }

  function drawSeries(svg, view, series, number) {
    const f = (value) => value.toFixed(1);
    for (const part of stretches(series.points, series.step)) {
      const line = part.map(([at, average]) => `${f(view.x(at))},${f(view.y(average))}`).join("L");
      const upper = part.map(([at, , , most]) => `${f(view.x(at))},${f(view.y(most))}`);
      const lower = part.map(([at, , least]) => `${f(view.x(at))},${f(view.y(least))}`).reverse();
      if (part.length > 1 && series.step > 30) svg.append(node("path", { class: `band band-${number}`, d: `M${[...upper, ...lower].join("L")}Z` }));
      if (part.length > 1) svg.append(node("path", { class: `curve curve-${number}`, d: `M${line}` }));
      else svg.append(node("circle", { class: `dot dot-${number}`, cx: f(view.x(part[0][0])), cy: f(view.y(part[0][1])), r: 2 }));
    }
  }

  // One on top of the other, where all of them are known.
  function drawStack(svg, view, list) {
    const sums = new Map();
    list.forEach((series, number) => {
      const points = series.points.filter((point) => number === 0 || sums.has(point[0]));
      for (const part of stretches(points, series.step)) {
        const lower = part.map(([at]) => [at, sums.get(at) || 0]);
        const upper = part.map(([at, average], n) => [at, lower[n][1] + average]);
        const line = (some) => some.map(([at, value]) => `${view.x(at).toFixed(1)},${view.y(value).toFixed(1)}`).join("L");
        svg.append(node("path", { class: `stack stack-${number}`, d: `M${line(upper)}L${line(lower.reverse())}Z` }));
        for (const [at, value] of upper) sums.set(at, value);
      }
    });
  }

  // A field that is made of others, point by point: null where one of them is not known.
  function combine(parts, how) {
    const known = parts.filter((series) => series && series.points.length);
    if (!known.length) return { points: [], step: 30 };
    const values = known.map((series) => new Map(series.points.map((point) => [point[0], point[1]])));
    const times = [...new Set(known.flatMap((series) => series.points.map((point) => point[0])))].sort((a, b) => a - b);
    const points = times.map((at) => [at, how(values.map((map) => map.get(at)))]).filter(([, value]) => value !== null && !Number.isNaN(value));
    return { points: points.map(([at, value]) => [at, value, value, value]), step: known[0].step };
  }

  const MADE = {       // field -> [the fields it is made of, how]; devices, sensors and pools are named by the page
    "~used": [() => ["node.memory_total_bytes", "node.memory_available_bytes", "node.arc_size_bytes"], ([total, free, arc]) => total - free - (arc || 0)],
    "~arc": [() => ["node.arc_size_bytes"], ([arc]) => arc],
    "~free": [() => ["node.memory_available_bytes"], ([free]) => free],
    "~read": [(frame) => partsOf(frame, "devices").map((name) => `node/block_devices/${name}.read_bytes_total`), sumOf],
    "~written": [(frame) => partsOf(frame, "devices").map((name) => `node/block_devices/${name}.write_bytes_total`), sumOf],
    "~busy": [(frame) => partsOf(frame, "devices").map((name) => `node/block_devices/${name}.busy_seconds_total`), mostOf],
    "~hottest": [(frame) => partsOf(frame, "sensors").map((name) => `node/temperatures/${name}.celsius`), mostOf],
  };
  const partsOf = (frame, kind) => JSON.parse(frame.dataset[kind] || "[]").slice(0, 60);
  function sumOf(values) { return values.reduce((sum, value) => sum + (value || 0), 0); }
  function mostOf(values) { return Math.max(...values.filter((value) => value !== undefined)); }

  function namesOf(frame, subject, fields) {
    if ("~pools" in fields) return partsOf(frame, "pools").map((name) => `pools/${name}.capacity_ratio`);
    return Object.keys(fields).flatMap((field) => MADE[field] ? MADE[field][0](frame) : [`${subject}.${field}`]);
  }

  function seriesOf(frame, subject, fields, found) {
    if ("~pools" in fields) return partsOf(frame, "pools").map((name) => ({ ...found.get(`pools/${name}.capacity_ratio`), label: name })).filter((series) => series.points);
    return Object.entries(fields).map(([field, label]) => {
      const made = MADE[field];
      return { ...(made ? combine(made[0](frame).map((name) => found.get(name)), made[1]) : found.get(`${subject}.${field}`)), label };
    }).filter((series) => series.points && series.points.length);
  }

  function drawMarks(svg, view, marks) {
    const y = CHART_HEIGHT - BOTTOM + 9;
    for (const mark of marks) {
      if (mark.at < view.from || mark.at > view.to) continue;
      const x = view.x(mark.at);
      const shape = { reboot: `M${x - 4},${y + 3}h8l-4,-7z`, alert: `M${x},${y - 4}l4,4l-4,4l-4,-4z`, scrub: `M${x - 3},${y - 3}h6v6h-6z` }[mark.kind];
      svg.append(node("g", { class: `event event-${mark.kind}` },
        node("title", {}, `${mark.text} – ${clock(mark.at)}`), node("line", { x1: x, x2: x, y1: TOP, y2: CHART_HEIGHT - BOTTOM }), node("path", { d: shape })));
    }
  }

  // The nearest point of each series to a time; where there is none near, it says so.
  function readOut(figure, at) {
    const { view, unit, list, marks } = figure.chart;
    const tolerance = Math.max(list[0].step, (view.to - view.from) / 150) * 1.5;
    const told = list.map((series) => {
      const near = series.points.reduce((best, point) => !best || Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best, null);
      if (!near || Math.abs(near[0] - at) > tolerance) return `${series.label} –`;
      const text = UNIT_TEXT[unit];
      return `${series.label} ${text(near[1])}${near[2] < near[3] ? ` (${text(near[2])} – ${text(near[3])})` : ""}`;
    });
    const events = marks.filter((mark) => Math.abs(view.x(mark.at) - view.x(at)) < 5).map((mark) => mark.text);
    const when = new Date(at * 1000).toLocaleString([], { ...(range > 86400 ? { day: "numeric", month: "short" } : {}), ...(range > 2e7 ? { year: "numeric" } : {}), hour: "2-digit", minute: "2-digit", ...(range <= 3600 ? { second: "2-digit" } : {}), hourCycle: "h23" });
    $(".chart-read", figure).textContent = [when, ...told, ...events.slice(0, 3)].join(" · ");
    const cursor = $(".cursor", figure);
    cursor.setAttribute("x1", view.x(at)); cursor.setAttribute("x2", view.x(at));
    figure.classList.add("is-read");
    figure.chart.at = at;
  }

  function endReadOut(figure) {
    figure.classList.remove("is-read");
    $(".chart-read", figure).textContent = figure.chart.summary;
    figure.chart.at = null;
  }

  function summary(list, unit) {
    return list.map((series) => {
      const last = series.points[series.points.length - 1];
      return last ? `${series.label} ${UNIT_TEXT[unit](last[1])}` : `${series.label} –`;
    }).join(" · ");
  }

  function drawChart(body, title, unit, list, span, marks, { stacked = false, most: given = 0 } = {}) {
    const width = Math.max(260, Math.floor(body.clientWidth / (body.clientWidth > 620 ? 2 : 1)) - 10);
    const highest = (series) => series.points.reduce((most, point) => Math.max(most, point[3]), 0);
    const most = Math.max(given, stacked ? highest(combine(list, sumOf)) : Math.max(0, ...list.map(highest)));
    const top = niceTop(most, unit);
    const view = { ...span, top, width, x: (at) => LEFT + (at - span.from) / (span.to - span.from) * (width - LEFT - RIGHT),
      y: (value) => TOP + (1 - Math.max(0, value) / top) * (CHART_HEIGHT - TOP - BOTTOM) };
    const told = summary(list, unit);
    const svg = node("svg", { class: "chart", viewBox: `0 0 ${width} ${CHART_HEIGHT}`, width, height: CHART_HEIGHT, tabindex: "0", role: "img", "aria-label": `${title}: ${told}. Left and right arrow keys read single values.` });
    drawAxes(svg, view, unit);
    drawMarks(svg, view, marks);
    if (stacked) drawStack(svg, view, list); else list.forEach((series, number) => drawSeries(svg, view, series, number));
    svg.append(node("line", { class: "cursor", y1: TOP, y2: CHART_HEIGHT - BOTTOM }));
    const figure = node("figure", { class: "chart-figure" },
      node("figcaption", {}, node("strong", {}, title), ...(list.length > 1 ? list.map((series, number) => keyOfSeries(series, number, stacked)) : []), node("span", { class: "chart-read" }, told)), svg);
    figure.chart = { view, unit, list, marks, summary: told, at: null };
    svg.addEventListener("pointermove", (event) => {
      const x = event.clientX - svg.getBoundingClientRect().left;
      readAll(figure, Math.min(view.to, Math.max(view.from, view.from + (x - LEFT) / (width - LEFT - RIGHT) * (view.to - view.from))));
    });
    svg.addEventListener("pointerleave", () => endReadAll(figure));
    svg.addEventListener("blur", () => endReadAll(figure));
    svg.addEventListener("keydown", (event) => chartKey(event, figure));
    return figure;
  }

  // The line as it is drawn, with its name.
  function keyOfSeries(series, number, stacked) {
    const sample = node("svg", { class: "key-line", viewBox: "0 0 18 6", "aria-hidden": "true" },
      stacked ? node("rect", { class: `stack stack-${number}`, width: 18, height: 6 }) : node("path", { class: `curve curve-${number}`, d: "M0,3H18" }));
    return node("span", { class: "key" }, sample, series.label);
  }

  // One crosshair over all charts of a card: they share the axis of time.
  function readAll(figure, at) {
    for (const other of $$(".chart-figure", figure.parentNode)) readOut(other, at);
  }

  function endReadAll(figure) {
    for (const other of $$(".chart-figure", figure.parentNode || figure)) endReadOut(other);
  }

  function chartKey(event, figure) {
    const { view, list } = figure.chart;
    const step = Math.max(list[0].step, (view.to - view.from) / 120);
    const from = figure.chart.at ?? view.to + step;
    const to = { ArrowLeft: from - step, ArrowRight: from + step, Home: view.from, End: view.to }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    readAll(figure, Math.min(view.to, Math.max(view.from, to)));
  }

  async function getJson(address) {
    try {
      const answer = await fetch(address, { credentials: "same-origin", signal: AbortSignal.timeout(TIMEOUT_MS) });
      return answer.ok ? await answer.json() : null;
    } catch { return null; }
  }

  // Reboots (the uptime fell), alerts and scrubs, on the axis of every chart of the host.
  function marksOf(uptime, alerts, host) {
    const marks = [];
    (uptime ? uptime.points : []).forEach((point, n, points) => { if (n && point[2] < points[n - 1][2]) marks.push({ kind: "reboot", at: point[0], text: "reboot" }); });
    for (const alert of alerts ? alerts.items : []) if (alert.state !== "pending") marks.push({ kind: "alert", at: alert.since, text: alert.message });
    for (const pool of ((host && host.sections && host.sections.pools || {}).body || [])) {
      for (const at of [(pool.scan || {}).started_at, (pool.scan || {}).ended_at, (pool.last_scrub || {}).ended_at]) {
        if (typeof at === "number" && !marks.some((mark) => mark.kind === "scrub" && mark.at === at)) marks.push({ kind: "scrub", at, text: `${pool.name}: ${at === (pool.scan || {}).started_at ? "scan began" : "scan ended"}` });
      }
    }
    return marks;
  }

  async function showCharts({ again = false } = {}) {
    const frame = $("[data-charts]");
    clearTimeout(chartsTimer);
    if (!frame || document.hidden) return;
    if (!again && frame.dataset.shown) { chartsTimer = setTimeout(() => showCharts({ again: true }), 30000); return; }
    const ticket = ++chartsAsked, name = frame.dataset.charts, subject = $("[data-subject]", frame).value;
    const table = CHARTS[subject.split("/")[0]], to = Math.floor(now()), span = { from: to - range, to };
    frame.dataset.shown = "1";
    const beside = subject === "node" ? $("[data-beside]", frame).value.trim() : "";
    const names = [...new Set(["node.uptime_seconds", ...table.flatMap(([, , fields]) => namesOf(frame, subject, fields))])];
    const query = new URLSearchParams([...names.map((series) => ["series", series]), ["from", span.from], ["to", to], ...(range === 604800 ? [["step", 900]] : [])]);
    const past = (host) => getJson(apiOf(host, `/history?${query}`));
    const [history, alerts, host, gaps, other] = await Promise.all([past(name), getJson(`/api/v1/alerts?state=all&host=${encodeURIComponent(name)}`), getJson(apiOf(name)), getJson(apiOf(name, `/gaps?from=${Math.floor(now()) - 172800}`)), beside ? past(beside) : null]);
    if (ticket !== chartsAsked || !frame.isConnected) return;
    chartsTimer = setTimeout(() => showCharts({ again: true }), range <= 21600 ? 30000 : 300000);
    const body = $("[data-charts-body]", frame);
    if ($(".is-read", body)) return;                 // somebody is reading it: not under the reader's hand
    body.setAttribute("aria-busy", "false");
    if (!history) { body.textContent = "The history could not be read."; return; }
    const found = new Map(history.series.map((series) => [series.name, series]));
    const marks = marksOf(found.get("node.uptime_seconds"), alerts, host);
    const theirs = other && new Map(other.series.map((series) => [series.name, series]));
    const figures = table.flatMap(([title, unit, fields, stacked]) => {
      const lists = [found, ...(theirs ? [theirs] : [])].map((past) => seriesOf(frame, subject, fields, past));
      const most = Math.max(0, ...lists.map((list) => stacked ? Math.max(0, ...combine(list, sumOf).points.map((point) => point[1])) : Math.max(0, ...list.flatMap((series) => series.points.map((point) => point[3])))));
      return lists.map((list, number) => list.length && drawChart(body, theirs ? `${title}, ${number ? beside : name}` : title, unit, list, span, number ? [] : marks, { stacked: Boolean(stacked), most })).filter(Boolean);
    });
    const focused = [...body.children].indexOf(document.activeElement && document.activeElement.closest(".chart-figure"));
    body.replaceChildren(...figures);
    if (!figures.length) body.textContent = "Nothing was recorded in this period.";
    if (focused >= 0 && figures[focused]) $("svg", figures[focused]).focus({ preventScroll: true });
    $("[data-charts-note]", frame).textContent = (beside && !other ? `There is no history for ${beside}. ` : "") + gapsText(gaps);
  }

  function gapsText(gaps) {
    if (!gaps) return "";
    const told = gaps.silences.slice(-3).map((one) => `${clock(one.from)}, ${showDuration(one.seconds)}`);
    const silent = told.length ? `Silent in the last two days: ${told.join("; ")}.` : "No silence in the last two days.";
    const last = gaps.lost[gaps.lost.length - 1];
    const lost = gaps.missing_reports ? ` ${countOf(gaps.missing_reports, "report")} never came${last ? `, the last ${showNumber(last.reports)} before ${clock(last.to)}` : ""}.` : " No report is missing.";
    return silent + lost;
  }

  function chooseRange(button) {
    range = Number(button.dataset.range);
    keepInAddress();
    pressRange();
    showCharts({ again: true });
  }

  function pressRange() {
    for (const button of $$("[data-range]")) button.setAttribute("aria-pressed", String(Number(button.dataset.range) === range));
  }

  // What the charts show is in the address: a link to it shows the same.
  function keepInAddress() {
    const frame = $("[data-charts]"), parameters = inAddress();
    const chosen = { range: Object.keys(SPANS).find((word) => SPANS[word] === range), subject: $("[data-subject]", frame).value, beside: $("[data-beside]", frame).value.trim() };
    if (chosen.range === "24h") chosen.range = "";
    if (chosen.subject === frame.dataset.first) chosen.subject = "";
    for (const [name, value] of Object.entries(chosen)) if (value) parameters.set(name, value); else parameters.delete(name);
    history.replaceState(null, "", `${location.pathname}?${parameters}${location.hash}`);
  }

  function firstCharts() {
    const frame = $("[data-charts]"), subject = inAddress().get("subject");
    range = SPANS[inAddress().get("range")] || range;
    if (frame && subject && [...$("[data-subject]", frame).options].some((option) => option.value === subject)) $("[data-subject]", frame).value = subject;
    if (frame) $("[data-beside]", frame).value = inAddress().get("beside") || "";
    pressRange();
    showCharts({ again: true });
  }

  // --- problems: what is taken back at once; all else asks first (acting) ---
  const alertApi = (id, rest) => `/api/v1/alerts/${encodeURIComponent(id)}/${rest}`;
  const silenceApi = (id) => `/api/v1/silences/${encodeURIComponent(id)}`;
  const each = (ids, call) => Promise.all(ids.split(",").map(call));       // a line may stand for several alerts
  const unacknowledge = (ids) => each(ids, (id) => write("DELETE", alertApi(id, "acknowledge")));

  function onProblem(event) {
    const back = event.target.closest("[data-unacknowledge]"), end = event.target.closest("[data-end-silence]");
    if (end) doing(null, () => write("DELETE", silenceApi(end.dataset.endSilence)));
    if (back) doing(null, () => unacknowledge(back.dataset.unacknowledge));
  }

  // --- acting: acknowledge, mute, maintenance and accept in one dialog: scope, time, note, and an undo ---
  const NEVER = ["", "it gets worse"], TIMES = [["1800", "in 30 min"], ["3600", "in 1 h"], ["7200", "in 2 h"], ["14400", "in 4 h"], ["28800", "in 8 h"], ["morning", "tomorrow 08:00"], ["own", "a time of my own …"]];
  const ACTS = {
    acknowledge: { title: "Acknowledge", yes: "Acknowledge", until: [NEVER, ...TIMES],
      says: ({ until }) => `Quiet until it gets worse${until ? `, or until ${clock(until)}` : ""}. It stays listed under “acknowledged”.`,
      async run({ data, until, note }) {
        await each(data.acknowledge, (id) => write("POST", alertApi(id, "acknowledge"), { ...(until && { until }), ...(note && { note }) }));
        return ["Acknowledged.", () => unacknowledge(data.acknowledge)];
      } },
    mute: { title: "Mute", yes: "Mute", until: TIMES, scopes: muteScopes,
      says: ({ until, scope }) => `No notifications for ${scope[1]} until ${clock(until)}. It stays visible on this page.`,
      async run({ scope, until, note }) {
        const made = await write("POST", "/api/v1/silences", { ...scope[0], until, ...(note && { note }) });
        return [`Muted until ${clock(until)}.`, () => write("DELETE", silenceApi(made.id))];
      } },
    maintenance: { title: "Maintenance", yes: "Begin maintenance", until: TIMES, scopes: restScopes, noNote: true,
      says: ({ until, scope }) => `No notifications from ${scope[1]} until ${clock(until)}. Whatever still fires then is sent.`,
      run: beginMaintenance },
    accept: { title: "Accept as normal", yes: "Accept as normal", noNote: true,
      says: () => "The present value becomes the baseline: this alert ends, and the next one comes when it gets worse than now. There is no way back to the old baseline.",
      async run({ data }) { await write("POST", alertApi(data.accept, "accept"), {}); return ["Accepted as normal."]; } },
  };
  let acting = null;

  function wider({ host, site, tags }, what) {
    const named = [[host && { host }, `${what}${host}`], [site && { site }, `${what}all hosts of site ${site}`], ...tags.split(" ").filter(Boolean).map((tag) => [{ tag }, `${what}all hosts tagged ${tag}`])];
    return named.filter(([fields]) => fields);
  }

  function muteScopes({ rule, host, object, site, tags }) {
    const own = object ? [[{ rule, object, ...(host && { host }) }, `${rule} of ${object}${host ? ` on ${host}` : ""}`]] : [];
    const all = [...own, ...wider({ host, site, tags }, `${rule} on `).map(([fields, text]) => [{ rule, ...fields }, text])];
    return [...all, ...wider({ host, site: "", tags: "" }, "everything on "), ...(all.length ? [] : [[{ rule }, `${rule} anywhere`]])];
  }

  function restScopes(data) { return wider(data, ""); }

  async function beginMaintenance({ scope, until }) {
    const [[key, name]] = Object.entries(scope[0]);
    const list = key === "host" ? [await getJson(apiOf(name))] : ((await getJson(`/api/v1/hosts?${new URLSearchParams({ [key]: name, limit: 1000 })}`)) || {}).items;
    if (!list || !list[0]) throw new Error("The hosts could not be read, so nothing was changed.");
    const set = (rows) => Promise.all(rows.map((row) => write("PATCH", apiOf(row.name), { maintenance_until: row.until })));
    await set(list.map((host) => ({ name: host.name, until })));
    const many = list.length === 1 ? list[0].name : countOf(list.length, "host");
    return [`${many} in maintenance until ${clock(until)}.`, () => set(list.map((host) => ({ name: host.name, until: host.maintenance_until > now() ? host.maintenance_until : null })))];
  }

  function openAct(button) {
    const data = { host: "", site: "", tags: "", object: "", ...button.dataset }, act = ACTS[data.act];
    const dialog = $("#act"), form = $("form", dialog), fields = form.elements;
    acting = { act, data, scopes: act.scopes ? act.scopes(data) : [] };
    form.reset();
    $("#act-title").textContent = act.title;
    $(".act-what bdi").textContent = data.what;
    $("[type=submit]", form).textContent = act.yes;
    $(".form-error", form).textContent = "";
    const options = (select, list) => select.replaceChildren(...list.map(([value, text]) => node("option", { value }, text)));
    options(fields.scope, acting.scopes.map(([, text], number) => [number, text]));
    options(fields.until, act.until || []);
    $(".act-scope").hidden = !act.scopes;
    $(".act-until").hidden = !act.until;
    $(".act-note").hidden = Boolean(act.noNote);
    if (act.until && act.until[0] !== NEVER) fields.until.value = "7200";
    describeAct();
    dialog.showModal();
    $(data.act === "accept" ? "[data-act-cancel]" : "[type=submit]", form).focus();      // what cannot be undone is not one key away
  }

  function untilOf({ until, time }) {
    if (until.value === "own") return time.value ? Math.round(new Date(time.value).getTime() / 1000) : NaN;
    if (until.value !== "morning") return until.value ? Math.round(now()) + Number(until.value) : 0;
    const morning = new Date(now() * 1000);
    morning.setDate(morning.getDate() + 1);
    return Math.round(morning.setHours(8, 0, 0, 0) / 1000);
  }

  function chosenAct() {
    const fields = $("#act form").elements;
    return { data: acting.data, scope: acting.scopes[Number(fields.scope.value || 0)], until: untilOf(fields), note: fields.note.value.trim() };
  }

  function describeAct() {
    const chosen = chosenAct(), bad = Number.isNaN(chosen.until) || (chosen.until && chosen.until <= now());
    $(".act-time").hidden = $("#act form").elements.until.value !== "own";
    $(".act-says").textContent = bad ? "Choose a time to come." : acting.act.says(chosen);
    $("#act [type=submit]").disabled = Boolean(bad);
  }

  function runAct(form) {
    return doing(form, async () => {
      refuseIfLost();
      const [text, undo] = await acting.act.run(chosenAct());
      $("#act").close();
      offerUndo(text, undo);
    });
  }

  let undoing = null, undoTimer = 0;
  function offerUndo(text, undo) {
    const line = $("#undo");
    undoing = undo;
    $(".undo-text", line).textContent = text;
    $("[data-undo]", line).hidden = !undo;
    line.hidden = false;
    clearTimeout(undoTimer);
    undoTimer = setTimeout(function away() {
      if (line.matches(":hover, :focus-within")) undoTimer = setTimeout(away, 2000); else line.hidden = true;
    }, 10000);
  }

  function undo() {
    $("#undo").hidden = true;
    doing(null, undoing);
  }

  // --- onboarding: a new host's token, and what has come of it since ---
  let watched = 0;
  function showToken({ host, token, install }) {
    const panel = $("#token"), texts = { name: host.name, token, install: install.join("\n") };
    for (const [name, text] of Object.entries(texts)) $(`[data-fill="${name}"]`, panel).textContent = text;
    panel.hidden = false;
    panel.scrollIntoView({ block: "nearest" });
    $("#token-title").focus({ preventScroll: true });
    watchHost(host.name);
  }

  function dismissToken() {
    const panel = $("#token");
    clearTimeout(watched);
    for (const place of $$("[data-fill]", panel)) place.textContent = "";
    panel.hidden = true;
  }

  async function watchHost(name) {
    clearTimeout(watched);
    const [host, channels] = await Promise.all([getJson(apiOf(name)), getJson("/api/v1/channels")]);
    if ($("#token").hidden || $('#token [data-fill="name"]').textContent !== name) return;
    if (host) $("[data-steps]").replaceChildren(...stepsOf(host, channels ? channels.items : []).map(([done, text]) => node("li", { class: done ? "done" : "" }, `${done ? "✓" : "…"} ${text}`)));
    watched = setTimeout(() => watchHost(name), POLL_MS);
  }

  function stepsOf(host, channels) {
    const body = (name) => (host.sections[name] || {}).body;
    const part = (name, seen, waiting) => body(name) ? [true, seen] : (host.sections[name] || {}).absent ? [true, `${name}: does not apply on this host`] : [false, waiting];
    const scrubbed = (body("pools") || []).some((pool) => pool.last_scrub), jobs = (body("backups") || {}).jobs || [];
    return [
      host.last_seen_at === null ? [false, "waiting for the first report; it comes within seconds once the agent runs"] : [true, "it reports"],
      part("pools", "its pools are known", "its pools come within a minute"),
      part("guests", "its guests are known", "its guests come within a minute"),
      part("disks", "its disks are known", "its disks come within some minutes"),
      jobs.length ? [true, `${countOf(jobs.length, "backup job")} seen`] : [false, "no backup job seen yet"],
      scrubbed ? [true, "a scrub is known"] : [false, "no scrub is known yet"],
      channels.some((channel) => channel.last_sent_at) ? [true, "a notification has been delivered"] : [false, "no notification has been delivered yet: send a test under Alerts"],
    ];
  }

  // --- alerting: a test through a channel, and what changed rules would have said ---
  async function testChannel(button) {
    const said = $(".slim-said", button.closest(".slim-line"));
    button.disabled = true;
    said.className = "slim-said muted";
    said.textContent = "sending …";
    try {
      await write("POST", `/api/v1/channels/${encodeURIComponent(button.dataset.testChannel)}/test`, {});
      said.textContent = "The test was accepted by the channel.";
    } catch (problem) {
      said.className = "slim-said level-critical";
      said.textContent = `The test failed: ${problem.message}`;
    }
    button.disabled = false;
    load(here(), { force: true });
  }

  function preview(form) {
    const { settings, since } = form.elements, place = $(".preview-result", form);
    place.replaceChildren(node("p", { class: "muted" }, "Looking at the history …"));
    return doing(form, async () => {
      try {
        const body = { since: Number(since.value), settings: settings.value.trim() ? settings.value : null };
        place.replaceChildren(...previewOf(await write("POST", "/api/v1/rules/replay", body)));
        writeAges(place);
      } catch (problem) {
        place.replaceChildren();
        if (problem.told && problem.told.line) selectLine(settings, problem.told.line);
        throw problem;
      }
    });
  }

  function selectLine(area, line) {
    const before = area.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
    area.focus();
    area.setSelectionRange(before, before + area.value.slice(before).split("\n")[0].length);
  }

  function previewOf({ items, total, since, complete }) {
    const reach = since === null ? "No reports are kept of that time." : `Judged from ${clock(since)} on.`;
    const part = complete ? "" : " It took too long and was stopped: this is only a part, a shorter time shows all.";
    const said = node("p", {}, node("strong", {}, `${countOf(total, "alert")} would have fired.`), ` ${reach}${part}`);
    if (!items.length) return [said];
    const rows = items.slice(-200).reverse().map((one) => node("tr", {}, node("td", { class: `state-${one.severity}` }, one.severity), node("td", {}, one.message),
      node("td", {}, [one.host || "fleet", one.object].filter(Boolean).join(" ")), node("td", {}, one.rule), node("td", {}, clock(one.fired_at)),
      node("td", {}, one.over_at === null ? "still" : showDuration(one.over_at - one.fired_at))));
    const head = ["Severity", "Problem", "Where", "Rule", "Fired", "For"].map((text) => node("th", {}, text));
    const more = total > rows.length ? [node("p", { class: "muted" }, `The last ${rows.length} are shown.`)] : [];
    return [said, node("div", { class: "scroll" }, node("table", { class: "plain" }, node("thead", {}, node("tr", {}, ...head)), node("tbody", {}, ...rows))), ...more];
  }

  function onClick(event) {
    const on = (selector) => event.target.closest(selector);
    let button;
    closeColumns(event);
    if (on("#theme")) nextTheme();
    else if ((button = on("[data-night]"))) { lastNight(button); followLink(event); }
    else if ((button = on("[data-usual]"))) { keep(`columns-${button.dataset.usual}`, ""); followLink(event); }
    else if ((button = on("[data-copy]"))) copy(button);
    else if ((button = on("[data-copy-link]"))) copyLink(button);
    else if (on("[data-dismiss]")) dismissToken();
    else if ((button = on("[data-act]"))) openAct(button);
    else if (on("[data-act-cancel]")) $("#act").close();
    else if (on("[data-undo]")) undo();
    else if (on("[data-words]")) $("#words").showModal();
    else if ((button = on("[data-copy-text]"))) copyText(button);
    else if (on("#reorder")) load(here(), { force: true });
    else if ((button = on("[data-open-edit]"))) openEdit(button);
    else if ((button = on("[data-rotate]"))) rotate(button);
    else if ((button = on("[data-remove]"))) remove(button);
    else if ((button = on("[data-call]"))) callApi(button);
    else if ((button = on("[data-range]"))) chooseRange(button);
    else if ((button = on("[data-test-channel]"))) testChannel(button);
    else if ((button = on("[data-end-maintenance]"))) doing(null, () => write("PATCH", apiOf(button.dataset.endMaintenance), { maintenance_until: null }));
    else followLink(event);
  }

  function onSubmit(event) {
    const form = event.target;
    if (form.matches(".search")) { event.preventDefault(); search(false); }
    if (form.matches("[data-register]")) { event.preventDefault(); register(form); }
    if (form.matches("[data-edit]")) { event.preventDefault(); edit(form); }
    if (form.matches("[data-act-form]")) { event.preventDefault(); runAct(form); }
    if (form.matches("[data-send]")) { event.preventDefault(); sendForm(form); }
    if (form.matches("[data-preview]")) { event.preventDefault(); preview(form); }
  }

  function start() {
    setTheme(kept("theme"));
    writeAges();
    document.addEventListener("click", onClick);
    document.addEventListener("submit", onSubmit);
    if (!$("#main")) return;                       // the log-in page has no more than this
    placed = here();
    setInterval(writeAges, 1000);
    settle("");
    showTab();
    document.addEventListener("visibilitychange", beat);
    timer = setTimeout(beat, POLL_MS);
    if (wall()) return;                            // nothing to press
    document.addEventListener("keydown", onKey);
    document.addEventListener("click", onProblem);
    document.addEventListener("change", (event) => { if (event.target.closest("#act")) describeAct(); });
    document.addEventListener("change", (event) => { const form = event.target.closest("[data-columns]"); if (form) chooseColumns(form); });
    document.addEventListener("change", (event) => { if (event.target.matches("[data-subject], [data-beside]")) { keepInAddress(); showCharts({ again: true }); } });
    addEventListener("resize", () => { clearTimeout(chartsTimer); chartsTimer = setTimeout(() => showCharts({ again: true }), 300); });
    addEventListener("beforeprint", () => { for (const fold of $$("#drawer .fold")) fold.open = true; });
    addEventListener("popstate", () => { showSearch(); load(here(), { force: true }); });
    $("#search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => search(true), TYPING_MS); });
    if (withColumns(location.href) !== location.href) go(location.href, { replace: true });
  }

  document.addEventListener("DOMContentLoaded", start);
})();
