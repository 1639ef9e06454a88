"""`ditc serve --ray`: one HTTP front, and replicas in processes of their own that draw. Only `cluster.py` knows Ray."""
