-- The outbox, version 1.  `outbox.py` is the only writer of these tables; docs/architecture.md draws the states.

-- Events that have not left.  Ids are dense: each is one more than the last ever given, which is
-- max(the last row here, state.last_id).  A plain rowid table without an index: a put touches one leaf page.
CREATE TABLE event (
    id          INTEGER PRIMARY KEY,
    appended_at INTEGER NOT NULL,         -- milliseconds since 1970, wall clock of the call
    body        BLOB NOT NULL             -- the message as UTF-8 JSON, sent as it is
);

-- Events that the receiver refused by themselves.  They keep their id; requeueing gives a new one.
CREATE TABLE dead (
    id          INTEGER PRIMARY KEY,
    appended_at INTEGER NOT NULL,
    buried_at   INTEGER NOT NULL,         -- milliseconds since 1970
    status      INTEGER NOT NULL,         -- of the refusing answer
    code        TEXT NOT NULL,            -- from its JSON body, or "unknown"
    answer      TEXT NOT NULL,            -- the first 2 KiB of it
    body        BLOB NOT NULL
);

-- A range of events that one sender has on its way.
CREATE TABLE lease (
    first_id  INTEGER PRIMARY KEY,
    last_id   INTEGER NOT NULL,
    token     BLOB NOT NULL,              -- random; fences every ack, release and bury
    attempt   INTEGER NOT NULL,           -- attempts known to have been made before this one
    holder    INTEGER NOT NULL,           -- byte of the lock file that the holding process has locked
    pid       INTEGER NOT NULL,           -- for people only
    boot_id   TEXT NOT NULL,
    leased_at REAL NOT NULL,              -- seconds on the boot clock
    deadline  REAL NOT NULL               -- seconds on the boot clock
);

-- One row, written only when rows leave.  What has left is in these counters, so that
-- pending = last id - (delivered + buried + erased + expired) holds without counting.
CREATE TABLE state (
    only        INTEGER PRIMARY KEY CHECK (only = 1),
    last_id     INTEGER NOT NULL,         -- at least the id of every event that has left
    delivered   INTEGER NOT NULL,
    buried      INTEGER NOT NULL,         -- moved to `dead`, ever
    erased      INTEGER NOT NULL,         -- removed from `event` by an operator
    expired     INTEGER NOT NULL,         -- removed from `event` by max_age
    requeued    INTEGER NOT NULL,         -- moved from `dead` back to `event`, ever
    dead_erased INTEGER NOT NULL          -- removed from `dead` by an operator
);
INSERT INTO state VALUES (1, 0, 0, 0, 0, 0, 0, 0);

-- One row, shared by all senders of the host.  Written when an attempt fails, and once when one succeeds after that.
CREATE TABLE backoff (
    only            INTEGER PRIMARY KEY CHECK (only = 1),
    boot_id         TEXT NOT NULL,        -- of the start of the machine that the times below count from
    not_before      REAL NOT NULL,        -- the next attempt, seconds on the boot clock
    not_before_wall REAL NOT NULL,        -- the same on the wall clock, used after a reboot only
    told            INTEGER NOT NULL,     -- 1: the receiver asked for this wait, nothing may shorten it
    failures        INTEGER NOT NULL,     -- failed attempts in a row that count against max_retries
    first_failure   REAL,                 -- when they began, seconds on the boot clock
    first_throttle  REAL,                 -- when the receiver began to say "later"
    reported        INTEGER NOT NULL,     -- 1: the budget is used up and on_error was called
    last_error      TEXT NOT NULL,
    last_error_at   INTEGER NOT NULL      -- milliseconds since 1970; 0 means never
);
INSERT INTO backoff VALUES (1, '', 0, 0, 0, 0, NULL, NULL, 0, '', 0);

-- Facts about the outbox as a whole: created_at, source_salt and source_digest, min_writer (the lowest schema version
-- that a process must know to write here).
CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO meta VALUES ('min_writer', '1');
