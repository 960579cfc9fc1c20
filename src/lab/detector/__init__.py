"""How good the laboratory's own judgement is: failures that were planted, and healthy runs."""
