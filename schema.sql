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
-- they tell duplicates from news for as long as there is any history, and lost reports from silence.
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

-- Alerts get acknowledged, told and silenced; those of a cluster, a site or the server itself have no host.
-- What people decided is kept in `meta` by the way down, and taken up again by the way up.
-- +migrate Up
CREATE TABLE alert_kept AS SELECT * FROM alert;
DROP TABLE alert;
CREATE TABLE alert (
    id                    INTEGER PRIMARY KEY AUTOINCREMENT,
    rule                  TEXT NOT NULL,
    host_id               INTEGER REFERENCES host(id) ON DELETE CASCADE,  -- NULL: of a cluster, a site, the server
    object                TEXT NOT NULL,                  -- '' = the host itself
    severity              TEXT NOT NULL,
    state                 TEXT NOT NULL,
    message               TEXT NOT NULL,
    value                 REAL,
    since                 REAL NOT NULL,                  -- when the condition was first seen
    worse_since           REAL,                           -- when it was first seen to be critical
    fired_at              REAL,
    resolved_at           REAL,
    because_of            INTEGER,
    acknowledged_at       REAL,
    acknowledged_by       TEXT,
    acknowledged_until    REAL,
    acknowledged_note     TEXT,
    acknowledged_severity TEXT,                           -- it holds until the alert is worse than this
    acknowledged_value    REAL,                           -- or its value is, for rules that say so
    told_severity         TEXT,                           -- what people were last told of it; NULL: nothing yet
    told_at               REAL,
    CHECK (severity IN ('info', 'warning', 'critical')),
    CHECK (state IN ('pending', 'firing', 'resolved'))
) STRICT;
INSERT INTO alert (id, rule, host_id, object, severity, state, message, value, since, fired_at, resolved_at,
                       because_of)
    SELECT id, rule, host_id, object, severity, state, message, value, since, fired_at, resolved_at, because_of
    FROM alert_kept;
DROP TABLE alert_kept;
UPDATE alert SET (acknowledged_at, acknowledged_by, acknowledged_until, acknowledged_note, acknowledged_severity,
                  told_severity, told_at, acknowledged_value) =
    (SELECT k.value ->> 1, k.value ->> 2, k.value ->> 3, k.value ->> 4, k.value ->> 5, k.value ->> 6, k.value ->> 7,
            k.value ->> 8
     FROM meta, json_each(meta.value) AS k WHERE meta.key = 'kept_acknowledgements' AND k.value ->> 0 = alert.id);
CREATE UNIQUE INDEX alert_open ON alert (ifnull(host_id, 0), rule, object) WHERE state <> 'resolved';
CREATE INDEX alert_resolved ON alert (resolved_at) WHERE state = 'resolved';

-- No notification for what fits all that is given, until it ends.
CREATE TABLE silence (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    tag        TEXT,
    site       TEXT,
    host       TEXT,
    object     TEXT,
    rule       TEXT,
    until      REAL NOT NULL,
    note       TEXT,
    created_by TEXT NOT NULL,
    created_at REAL NOT NULL
) STRICT;
INSERT INTO silence
    SELECT k.value ->> 0, k.value ->> 1, k.value ->> 2, k.value ->> 3, k.value ->> 4, k.value ->> 5, k.value ->> 6,
           k.value ->> 7, k.value ->> 8, k.value ->> 9
    FROM meta, json_each(meta.value) AS k WHERE meta.key = 'kept_silences';

-- What rules have to remember of a host: baselines, what was there before. JSON {rule: {object: …}}
CREATE TABLE rule_memory (
    host_id INTEGER PRIMARY KEY REFERENCES host(id) ON DELETE CASCADE,
    memory  TEXT NOT NULL
) STRICT;
INSERT INTO rule_memory
    SELECT k.value ->> 0, k.value ->> 1 FROM meta, json_each(meta.value) AS k
    WHERE meta.key = 'kept_memory' AND k.value ->> 0 IN (SELECT id FROM host);
DELETE FROM meta WHERE key IN ('kept_acknowledgements', 'kept_silences', 'kept_memory');

-- The outbox: what a channel has to tell, and the messages made of it. A message is made before it is sent, so
-- that one that is sent twice after a crash is the same message with the same id.
CREATE TABLE message (
    id          TEXT PRIMARY KEY,
    channel     TEXT NOT NULL,
    body        TEXT NOT NULL,                            -- JSON: kind, subject, items
    created_at  REAL NOT NULL,
    due_at      REAL NOT NULL,
    attempts    INTEGER NOT NULL DEFAULT 0,
    error       TEXT,
    sent_at     REAL,
    given_up_at REAL
) STRICT, WITHOUT ROWID;
CREATE INDEX message_open ON message (channel, due_at) WHERE sent_at IS NULL AND given_up_at IS NULL;
CREATE INDEX message_sent ON message (channel, sent_at) WHERE sent_at IS NOT NULL;
CREATE TABLE notification (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    channel    TEXT NOT NULL,
    alert_id   INTEGER,
    body       TEXT NOT NULL,                             -- JSON: kind, what, where, since, why, what to do, link
    created_at REAL NOT NULL,
    not_before REAL NOT NULL,
    message_id TEXT                                       -- NULL: waits; '-': over before it was told
) STRICT;
CREATE INDEX notification_waiting ON notification (channel, not_before) WHERE message_id IS NULL;

-- +migrate Down
INSERT INTO meta SELECT 'kept_acknowledgements', json_group_array(json_array(
    id, acknowledged_at, acknowledged_by, acknowledged_until, acknowledged_note, acknowledged_severity,
    told_severity, told_at, acknowledged_value)) FROM alert WHERE state <> 'resolved' AND host_id IS NOT NULL;
INSERT INTO meta SELECT 'kept_silences', json_group_array(json_array(
    id, tag, site, host, object, rule, until, note, created_by, created_at)) FROM silence;
INSERT INTO meta SELECT 'kept_memory', json_group_array(json_array(host_id, memory)) FROM rule_memory;
DROP TABLE notification;
DROP TABLE message;
DROP TABLE rule_memory;
DROP TABLE silence;
CREATE TABLE alert_kept AS SELECT * FROM alert WHERE host_id IS NOT NULL;
DROP TABLE alert;
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
INSERT INTO alert
    SELECT id, rule, host_id, object, severity, state, message, value, since, fired_at, resolved_at, because_of
    FROM alert_kept;
DROP TABLE alert_kept;
CREATE UNIQUE INDEX alert_open ON alert (host_id, rule, object) WHERE state <> 'resolved';
CREATE INDEX alert_resolved ON alert (resolved_at) WHERE state = 'resolved';

-- Who did what and from where, log-ins by name, and links for wall displays. A session is kept under an HMAC of its
-- cookie and its user's password hash: those of before cannot be carried over, everybody logs in once more.
-- +migrate Up
ALTER TABLE event ADD COLUMN "by" TEXT;                   -- session:NAME, token:NAME, kiosk:NAME or command:NAME
ALTER TABLE event ADD COLUMN address TEXT;
DELETE FROM session;
ALTER TABLE session ADD COLUMN user TEXT NOT NULL DEFAULT 'admin';
ALTER TABLE api_token ADD COLUMN kind TEXT NOT NULL DEFAULT 'token';  -- or 'kiosk'
CREATE TABLE user (
    name       TEXT PRIMARY KEY COLLATE NOCASE,
    hash       TEXT NOT NULL,                             -- Argon2id, of the password
    role       TEXT NOT NULL,
    created_at REAL NOT NULL,
    CHECK (role IN ('viewer', 'operator', 'admin'))
) STRICT, WITHOUT ROWID;

-- +migrate Down
DROP TABLE user;
DELETE FROM api_token WHERE kind <> 'token';              -- the version before would take them for API tokens
ALTER TABLE api_token DROP COLUMN kind;
DELETE FROM session;
ALTER TABLE session DROP COLUMN user;
ALTER TABLE event DROP COLUMN address;
ALTER TABLE event DROP COLUMN "by";

-- +migrate Up
-- What each channel was told of an alert, instead of what anybody was: JSON {channel: [severity, at]}. Of a resolved
-- one: who has still to be told that it is over.
ALTER TABLE alert ADD COLUMN told TEXT NOT NULL DEFAULT '{}';
DELETE FROM notification WHERE message_id IS NULL AND not_before > created_at AND body ->> '$.kind' <> 'resolved';
UPDATE alert SET told = (
    SELECT json_group_object(channel, json_array(severity, at)) FROM (
        SELECT channel, body ->> '$.severity' AS severity, max(created_at) AS at FROM notification
        WHERE alert_id = alert.id AND body ->> '$.kind' <> 'resolved' GROUP BY channel))
WHERE told_severity IS NOT NULL AND state <> 'resolved';
ALTER TABLE alert DROP COLUMN told_severity;
ALTER TABLE alert DROP COLUMN told_at;
CREATE INDEX alert_untold_end ON alert (ifnull(host_id, 0)) WHERE state = 'resolved' AND told <> '{}';
DROP INDEX notification_waiting;
ALTER TABLE notification DROP COLUMN not_before;
CREATE INDEX notification_waiting ON notification (channel) WHERE message_id IS NULL;
CREATE INDEX notification_message ON notification (message_id);
CREATE INDEX notification_alert ON notification (alert_id, channel);
CREATE INDEX message_made ON message (channel, created_at);

-- +migrate Down
-- '1-9?2' (two of these have not come) is '1-9' to older versions.
UPDATE run SET ranges = substr(ranges, 1, instr(ranges, '?') - 1)
                     || iif(instr(ranges, ',') > 0, substr(ranges, instr(ranges, ',')), '')
    WHERE instr(ranges, '?') > 0;
DELETE FROM meta WHERE key = 'secret_check';  -- made otherwise by older versions, which would take ours for a lost secret
DROP INDEX message_made;
DROP INDEX notification_alert;
DROP INDEX notification_message;
CREATE TABLE notification_kept AS SELECT * FROM notification;
DROP TABLE notification;
CREATE TABLE notification (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    channel    TEXT NOT NULL,
    alert_id   INTEGER,
    body       TEXT NOT NULL,                             -- JSON: kind, what, where, since, why, what to do, link
    created_at REAL NOT NULL,
    not_before REAL NOT NULL,
    message_id TEXT                                       -- NULL: waits; '-': over before it was told
) STRICT;
INSERT INTO notification SELECT id, channel, alert_id, body, created_at, created_at, message_id FROM notification_kept;
DROP TABLE notification_kept;
CREATE INDEX notification_waiting ON notification (channel, not_before) WHERE message_id IS NULL;
CREATE TABLE alert_kept AS SELECT * FROM alert;
DROP TABLE alert;
CREATE TABLE alert (
    id                    INTEGER PRIMARY KEY AUTOINCREMENT,
    rule                  TEXT NOT NULL,
    host_id               INTEGER REFERENCES host(id) ON DELETE CASCADE,  -- NULL: of a cluster, a site, the server
    object                TEXT NOT NULL,                  -- '' = the host itself
    severity              TEXT NOT NULL,
    state                 TEXT NOT NULL,
    message               TEXT NOT NULL,
    value                 REAL,
    since                 REAL NOT NULL,                  -- when the condition was first seen
    worse_since           REAL,                           -- when it was first seen to be critical
    fired_at              REAL,
    resolved_at           REAL,
    because_of            INTEGER,
    acknowledged_at       REAL,
    acknowledged_by       TEXT,
    acknowledged_until    REAL,
    acknowledged_note     TEXT,
    acknowledged_severity TEXT,                           -- it holds until the alert is worse than this
    acknowledged_value    REAL,                           -- or its value is, for rules that say so
    told_severity         TEXT,                           -- what people were last told of it; NULL: nothing yet
    told_at               REAL,
    CHECK (severity IN ('info', 'warning', 'critical')),
    CHECK (state IN ('pending', 'firing', 'resolved'))
) STRICT;
INSERT INTO alert
    SELECT id, rule, host_id, object, severity, state, message, value, since, worse_since, fired_at, resolved_at,
           because_of, acknowledged_at, acknowledged_by, acknowledged_until, acknowledged_note, acknowledged_severity,
           acknowledged_value,
           iif(told <> '{}' AND state <> 'resolved', severity, NULL), (SELECT max(value ->> '$[1]') FROM json_each(told))
    FROM alert_kept;
DROP TABLE alert_kept;
CREATE UNIQUE INDEX alert_open ON alert (ifnull(host_id, 0), rule, object) WHERE state <> 'resolved';
CREATE INDEX alert_resolved ON alert (resolved_at) WHERE state = 'resolved';

-- +migrate Up

-- The timeline shows how bad what happened was, when it happened; an alert's own row has its last severity only.
ALTER TABLE event ADD COLUMN severity TEXT;

-- +migrate Down

ALTER TABLE event DROP COLUMN severity;
