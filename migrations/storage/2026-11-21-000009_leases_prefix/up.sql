-- The leases whose names begin alike, in whatever collation the database is: only the order of bytes keeps them together.
-- No update changes a name, so those of a busy row stay on its page (HOT) and write nothing here.
CREATE INDEX leases_prefix ON leasehold.leases (name COLLATE "C");
