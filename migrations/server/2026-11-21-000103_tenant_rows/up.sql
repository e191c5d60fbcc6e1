-- Rows that a tenant owns outside of its workspaces. `seq` is the order in which they were made, as everywhere.

-- What users have said of something.
CREATE TABLE feedback_records (
    id         UUID PRIMARY KEY,
    tenant_id  TEXT COLLATE "C" NOT NULL REFERENCES tenants,
    user_id    TEXT COLLATE "C" CHECK (octet_length(user_id) BETWEEN 1 AND 256),
    field_id   TEXT COLLATE "C" CHECK (octet_length(field_id) BETWEEN 1 AND 256),
    value      JSONB NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    seq        BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE
);
CREATE INDEX feedback_records_tenant ON feedback_records (tenant_id, seq);
-- A user may be one in several tenants.
CREATE INDEX feedback_records_user ON feedback_records (user_id, seq);

-- Who is told of events. The secret signs what is sent, so it is kept as it is.
CREATE TABLE webhooks (
    id         UUID PRIMARY KEY,
    tenant_id  TEXT COLLATE "C" NOT NULL REFERENCES tenants,
    url        TEXT NOT NULL CHECK (octet_length(url) <= 2048),
    enabled    BOOLEAN NOT NULL,
    secret     TEXT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    seq        BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE
);
CREATE INDEX webhooks_tenant ON webhooks (tenant_id, seq);

SELECT leasehold.gate_table('feedback_records', 'tenant_id');
SELECT leasehold.gate_table('webhooks', 'tenant_id');
