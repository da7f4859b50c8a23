-- The whole schema as an ordered list of migrations; a migration's number is its place, the version is user_version.
-- Times are unix seconds (UTC). Nothing in here lets a reader act as a host, a user or an API client:
-- host keys need SECRET_KEY_BASE as well, tokens and sessions are kept as SHA-256.

-- +migrate Up
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE host (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again: report ids begin with it
    name              TEXT NOT NULL UNIQUE COLLATE NOCASE,
    nonce             BLOB NOT NULL,                      -- the host's key = HMAC(SECRET_KEY_BASE, nonce)
    site              TEXT,
    tags              TEXT NOT NULL DEFAULT '[]',         -- JSON list
    note              TEXT,
    maintenance_until REAL,
    created_at        REAL NOT NULL,
    rotated_at        REAL
) STRICT;

-- One start of an agent. `ranges` are the sequence numbers that have arrived, e.g. '1-4711,4713-4720':
-- they tell duplicates from news for ever, and lost reports from silence.
CREATE TABLE run (
    id           INTEGER PRIMARY KEY,
    host_id      INTEGER NOT NULL REFERENCES host(id) ON DELETE CASCADE,
    run_id       TEXT NOT NULL,
    ranges       TEXT NOT NULL,
    first_at     REAL NOT NULL,
    last_seen_at REAL NOT NULL,
    UNIQUE (host_id, run_id)
) STRICT;

-- Reports as they came. id = host_id << 42 | milliseconds of the report's time, so that one host's span of
-- time is one range of row ids and needs no index.
CREATE TABLE report (
    id          INTEGER PRIMARY KEY,
    run         INTEGER NOT NULL,
    seq         INTEGER NOT NULL,
    received_at REAL NOT NULL,
    body        BLOB NOT NULL                             -- JSON, gzip or zlib
) STRICT;

-- Which report holds the latest of each section: JSON {section: [report with the value, report with the status]}
CREATE TABLE latest (
    host_id  INTEGER PRIMARY KEY REFERENCES host(id) ON DELETE CASCADE,
    sections TEXT NOT NULL
) STRICT;

CREATE TABLE alert (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    rule         TEXT NOT NULL,
    host_id      INTEGER NOT NULL REFERENCES host(id) ON DELETE CASCADE,
    object       TEXT NOT NULL,                           -- '' = the host itself
    severity     TEXT NOT NULL,
    state        TEXT NOT NULL,
    message      TEXT NOT NULL,
    value        REAL,
    since        REAL NOT NULL,                           -- when the condition was first seen
    fired_at     REAL,
    resolved_at  REAL,
    because_of   INTEGER,
    CHECK (severity IN ('info', 'warning', 'critical')),
    CHECK (state IN ('pending', 'firing', 'resolved'))
) STRICT;
CREATE UNIQUE INDEX alert_open ON alert (host_id, rule, object) WHERE state <> 'resolved';
CREATE INDEX alert_resolved ON alert (resolved_at) WHERE state = 'resolved';

CREATE TABLE event (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    at      REAL NOT NULL,
    kind    TEXT NOT NULL,
    host    TEXT,
    object  TEXT,
    message TEXT NOT NULL
) STRICT;

CREATE TABLE session (
    hash       BLOB PRIMARY KEY,                          -- SHA-256 of the cookie
    created_at REAL NOT NULL,
    used_at    REAL NOT NULL,
    address    TEXT NOT NULL,
    user_agent TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE api_token (
    name       TEXT PRIMARY KEY,
    hash       BLOB NOT NULL UNIQUE,                      -- SHA-256 of the token
    admin      INTEGER NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL
) STRICT, WITHOUT ROWID;

-- +migrate Down
DROP TABLE api_token;
DROP TABLE session;
DROP TABLE event;
DROP TABLE alert;
DROP TABLE latest;
DROP TABLE report;
DROP TABLE run;
DROP TABLE host;
DROP TABLE meta;

-- +migrate Up
-- History as a log: `report` is its tail, as it came; an hour of a host becomes one chunk of columns, and those become
-- coarser ones. What is in a chunk has left `report`; the reports that still hold a latest state are kept here.
CREATE TABLE kept_report (
    id          INTEGER PRIMARY KEY,                      -- as in report
    run         INTEGER NOT NULL,
    seq         INTEGER NOT NULL,
    received_at REAL NOT NULL,
    body        BLOB NOT NULL
) STRICT;

-- What has a history, and which of its numbers stand together: chunks name both by number.
CREATE TABLE history_object (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    host_id INTEGER NOT NULL REFERENCES host(id) ON DELETE CASCADE,
    section TEXT NOT NULL,
    object  TEXT NOT NULL,                                -- '' = the section itself
    UNIQUE (host_id, section, object)
) STRICT;

CREATE TABLE history_layout (
    id     INTEGER PRIMARY KEY,
    fields TEXT NOT NULL UNIQUE                           -- JSON list of names
) STRICT;

-- id = host_id << 36 | step << 34 | unix time it begins at; step 0 as received, 1 = 5 minutes, 2 = an hour.
CREATE TABLE chunk (
    id         INTEGER PRIMARY KEY,
    written_at REAL NOT NULL,
    body       BLOB NOT NULL
) STRICT;

-- How far the days of a host are: 0 changed since they were rolled up, 1 rolled up, 2 the reports themselves are gone.
CREATE TABLE history_day (
    host_id INTEGER NOT NULL REFERENCES host(id) ON DELETE CASCADE,
    day     INTEGER NOT NULL,                             -- unix time it begins at
    state   INTEGER NOT NULL,
    PRIMARY KEY (host_id, day)
) STRICT, WITHOUT ROWID;

CREATE TABLE spark (
    host_id INTEGER PRIMARY KEY REFERENCES host(id) ON DELETE CASCADE,
    hours   TEXT NOT NULL                                 -- JSON {hour as unix time: CPU in use, 0-1}
) STRICT;

-- +migrate Down
DROP TABLE spark;
DROP TABLE history_day;
DROP TABLE chunk;
DROP TABLE history_layout;
DROP TABLE history_object;
INSERT OR IGNORE INTO report SELECT * FROM kept_report;
DROP TABLE kept_report;
