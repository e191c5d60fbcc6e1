DROP TABLE leasehold.dead_letters, leasehold.work_claims, leasehold.work_items;
