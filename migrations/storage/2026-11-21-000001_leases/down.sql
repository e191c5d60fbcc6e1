DROP TABLE leasehold.presence, leasehold.lock_audit, leasehold.settings, leasehold.token_floor, leasehold.leases;
DROP FUNCTION leasehold.next_token(BIGINT), leasehold.raise_token_floor(BIGINT);
