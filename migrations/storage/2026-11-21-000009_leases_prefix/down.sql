DROP INDEX leasehold.leases_prefix;
