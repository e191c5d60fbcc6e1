-- The tables of the reference API. `seq` is the order in which rows were made: lists are paged by it.
-- Identifiers are compared byte by byte, whatever the locale of the database.

CREATE TABLE tenants (
    id         TEXT COLLATE "C" PRIMARY KEY CHECK (id ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
    name       TEXT,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    seq        BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE
);

-- Half a page is left free, so that the updates of a busy workspace and of its lock stay on its page (HOT);
-- nothing that changes is indexed, for the same reason.
CREATE TABLE workspaces (
    tenant_id                    TEXT COLLATE "C" NOT NULL REFERENCES tenants,
    name                         TEXT COLLATE "C" NOT NULL CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
    description                  TEXT,
    version                      BIGINT NOT NULL DEFAULT 0 CHECK (version >= 0),
    created_at                   TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    updated_at                   TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    seq                          BIGINT GENERATED ALWAYS AS IDENTITY,
    workspace_lock_id            UUID,
    workspace_lock_operation     TEXT,
    workspace_locked_by          TEXT,
    workspace_lock_acquired_at   TIMESTAMPTZ,
    workspace_lock_expires_at    TIMESTAMPTZ,
    workspace_lock_fencing_token BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, name),
    UNIQUE (tenant_id, seq),
    CONSTRAINT workspaces_locked_whole_or_not_at_all CHECK (
        num_nulls(
            workspace_lock_id, workspace_lock_operation, workspace_locked_by,
            workspace_lock_acquired_at, workspace_lock_expires_at
        ) IN (0, 5)
    ),
    CONSTRAINT workspaces_locks_end_after_they_begin CHECK (workspace_lock_expires_at > workspace_lock_acquired_at)
) WITH (fillfactor = 50);

CREATE TABLE default_config (
    tenant_id   TEXT COLLATE "C" NOT NULL,
    workspace   TEXT COLLATE "C" NOT NULL,
    key         TEXT COLLATE "C" NOT NULL CHECK (key ~ '^[A-Za-z0-9._-]{1,128}$'),
    value       JSONB NOT NULL,
    description TEXT,
    version     BIGINT NOT NULL, -- the one that wrote it last
    seq         BIGINT GENERATED ALWAYS AS IDENTITY,
    PRIMARY KEY (tenant_id, workspace, key),
    UNIQUE (tenant_id, workspace, seq),
    FOREIGN KEY (tenant_id, workspace) REFERENCES workspaces ON DELETE CASCADE
);

CREATE TABLE contexts (
    tenant_id TEXT COLLATE "C" NOT NULL,
    workspace TEXT COLLATE "C" NOT NULL,
    id        UUID NOT NULL,
    condition JSONB NOT NULL CHECK (jsonb_typeof(condition) = 'object'),
    overrides JSONB NOT NULL CHECK (jsonb_typeof(overrides) = 'object'),
    priority  BIGINT NOT NULL,
    version   BIGINT NOT NULL, -- the one that wrote it last
    seq       BIGINT GENERATED ALWAYS AS IDENTITY,
    PRIMARY KEY (tenant_id, workspace, id),
    UNIQUE (tenant_id, workspace, seq),
    FOREIGN KEY (tenant_id, workspace) REFERENCES workspaces ON DELETE CASCADE
);

-- Every version whole: reading one, or going back to it, needs no other row.
CREATE TABLE versions (
    tenant_id     TEXT COLLATE "C" NOT NULL,
    workspace     TEXT COLLATE "C" NOT NULL,
    version       BIGINT NOT NULL CHECK (version > 0),
    operation     TEXT NOT NULL,
    author        TEXT NOT NULL,
    fencing_token BIGINT NOT NULL,
    snapshot      JSONB NOT NULL,
    created_at    TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, workspace, version),
    FOREIGN KEY (tenant_id, workspace) REFERENCES workspaces ON DELETE CASCADE
);

-- Who may do what. A key itself is never stored.
CREATE TABLE credentials (
    id               UUID PRIMARY KEY,
    key_sha256       BYTEA NOT NULL UNIQUE CHECK (octet_length(key_sha256) = 32),
    subject          TEXT NOT NULL CHECK (octet_length(subject) BETWEEN 1 AND 256),
    role             TEXT NOT NULL CHECK (role IN ('reader', 'writer', 'admin')),
    tenant_id        TEXT COLLATE "C" REFERENCES tenants ON DELETE CASCADE, -- NULL: all of them
    only_on_loopback BOOLEAN NOT NULL DEFAULT false,
    created_at       TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    expires_at       TIMESTAMPTZ,
    seq              BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE
);
CREATE INDEX credentials_tenant ON credentials (tenant_id);
