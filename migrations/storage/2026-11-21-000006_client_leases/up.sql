-- What clients of a service asked for when they were given leases that they keep alive themselves: any process that
-- serves them must know it. A row whose id the client has chosen stays for a while after the end of its lease, so that
-- the id is not granted again.
CREATE TABLE leasehold.client_leases (
    lock_id UUID PRIMARY KEY,
    name    TEXT NOT NULL,
    ttl     DOUBLE PRECISION NOT NULL CHECK (ttl > 0),
    ends_at TIMESTAMPTZ NOT NULL,
    chosen  BOOLEAN NOT NULL
);
