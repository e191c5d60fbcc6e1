DROP TABLE webhooks, feedback_records;
