def plans(w, i): raise NotImplementedError
